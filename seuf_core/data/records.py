"""Forget, retain and evaluation sets: what one record may hold.

Torch-free. A record of a forget or retain set is an `Example`, one of an evaluation set a `Probe`. Messages
name field and rule, never the text: a forget set must not reach a log.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from seuf_core.data.lines import LineProblem

Purpose = Literal["forget", "retain", "evaluation"]
Split = Literal["train", "selection", "test"]

# A rule of thumb for English and a vocabulary of 32,000 to 150,000; an estimate needs no tokenizer.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to forget or to keep. `completion` is what is learned or unlearned, given `prompt`.

    Attributes:
        id: unique in its file; "line-<n>" when the line gives none.
        prompt: "" for running text.
        completion: never blank.
        fact: ties phrasings and probes of one fact together; the id when the line gives none.
        domain: a label to group figures by; "" when the line gives none.
        alternative: the answer to prefer to the completion (objective dpo, forget sets); "" when the line gives none.
    """

    id: str
    prompt: str
    completion: str
    fact: str
    domain: str
    alternative: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """One question with its possible answers; choices[answer] is the true one, and the open answer.

    Attributes:
        set: which side it measures: what should be gone ("forget") or still there ("retain").
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    fact: str
    domain: str
    set: Literal["forget", "retain"]


def probe_of(example: Example, set_name: Literal["forget", "retain"]) -> Probe:
    """An example as a probe with one choice, for data sets that come without an evaluation set."""
    return Probe(
        id=example.id,
        prompt=example.prompt,
        choices=(example.completion,),
        answer=0,
        fact=example.fact,
        domain=example.domain,
        set=set_name,
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one file; depth counts nested objects and arrays. None: no bound, for a file of one's own."""

    max_bytes: int | None = None  # as sent
    max_stored_bytes: int | None = None  # as JSON Lines, where it was sent in another format
    max_line_bytes: int = 1 << 20
    max_examples: int = 100_000
    max_lines: int = 1_000_000  # blank ones included: a file of nothing else takes time too
    max_depth: int = 8
    max_name_chars: int = 256  # of an id, a fact, a domain
    max_choices: int = 64


Record = Example | Probe


def split_of(fact: str, seed: int, shares: tuple[float, float, float] = (0.5, 0.2, 0.3)) -> Split:
    """Which part of the data a fact belongs to: the same in every file, on every machine, for one seed.

    Args:
        fact: as in Example and Probe: all phrasings of one fact land on one side.
        shares: of train, selection and test; they sum to 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares {shares} must be at least 0 and sum to 1")
    digest = hashlib.sha256(f"{seed}:{fact}".encode()).digest()
    at = int.from_bytes(digest[:8]) / 2**64
    if at < shares[0]:
        return "train"
    return "selection" if at < shares[0] + shares[1] else "test"


_NAMES = ("id", "fact", "domain")
_FORMS = (("prompt", "completion"), ("text",), ("question", "answer"))
_EXAMPLE_FIELDS = (*_NAMES, *(name for form in _FORMS for name in form), "alternative")
_PROBE_FIELDS = (*_NAMES, "prompt", "choices", "answer", "set")


def fields_of(purpose: Purpose) -> tuple[str, ...]:
    """The fields that a record of this purpose may have."""
    return _PROBE_FIELDS if purpose == "evaluation" else _EXAMPLE_FIELDS


def record_of(purpose: Purpose, fields: dict[str, Any], number: int, limits: Limits) -> Record:
    """The Probe (evaluation) or Example (forget, retain) of these fields; `number` makes its id if it has none.

    Raises:
        LineProblem: unknown_field, missing_field, mixed_forms, wrong_type, blank_text, same_alternative,
            wrong_choices, wrong_answer, wrong_set, wrong_name.
    """
    return (_probe if purpose == "evaluation" else _example)(fields, number, limits)


def _example(fields: dict[str, Any], line: int, limits: Limits) -> Example:
    _only_known(fields, _EXAMPLE_FIELDS)
    given = [form for form in _FORMS if any(name in fields for name in form)]
    if len(given) > 1:
        raise LineProblem(
            "mixed_forms", "Give prompt and completion, or text, or question and answer: one form."
        )
    form = given[0] if given else _FORMS[0]
    completion = _text(fields, form[-1])
    prompt = _text(fields, "question") if form[0] == "question" else fields.get("prompt", "")
    if not isinstance(prompt, str):
        raise LineProblem("wrong_type", "Field 'prompt' must be a string.", "prompt")
    alternative = _text(fields, "alternative") if "alternative" in fields else ""
    if alternative and alternative.strip() == completion.strip():
        raise LineProblem(
            "same_alternative", f"Field 'alternative' is the same text as {form[-1]!r}.", "alternative"
        )
    id_, fact, domain = _names(fields, line, limits)
    return Example(id_, prompt, completion, fact, domain, alternative)


def _probe(fields: dict[str, Any], line: int, limits: Limits) -> Probe:
    _only_known(fields, _PROBE_FIELDS)
    prompt, choices = _text(fields, "prompt"), _choices(fields, limits)
    answer, side = fields.get("answer"), fields.get("set")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise LineProblem(
            "wrong_answer", f"Field 'answer' must be a choice's index, 0 to {len(choices) - 1}.", "answer"
        )
    if side != "forget" and side != "retain":
        raise LineProblem("wrong_set", 'Field \'set\' must be "forget" or "retain".', "set")
    id_, fact, domain = _names(fields, line, limits)
    return Probe(id_, prompt, choices, answer, fact, domain, side)


def _only_known(fields: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            shown = name if len(name) <= 40 else name[:40] + "..."
            raise LineProblem("unknown_field", f"Field {shown!r} is not known: use {', '.join(known)}.")


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise LineProblem("missing_field", f"Field {name!r} is missing.", name)
    return _not_blank(fields[name], f"Field {name!r}", name)


def _not_blank(value: Any, what: str, field: str) -> str:
    if not isinstance(value, str):
        raise LineProblem("wrong_type", f"{what} must be a string.", field)
    if not value.strip():
        raise LineProblem("blank_text", f"{what} must not be blank.", field)
    return value


def _choices(fields: dict[str, Any], limits: Limits) -> tuple[str, ...]:
    value = fields.get("choices")
    if not isinstance(value, list) or not 2 <= len(value) <= limits.max_choices:
        raise LineProblem(
            "wrong_choices", f"Field 'choices' must list 2 to {limits.max_choices} strings.", "choices"
        )
    choices = tuple(_not_blank(choice, f"Choice {number}", "choices") for number, choice in enumerate(value))
    if len(set(choices)) < len(choices):
        raise LineProblem(
            "wrong_choices", "Two choices are the same: a probe needs one true answer.", "choices"
        )
    return choices


def _names(fields: dict[str, Any], line: int, limits: Limits) -> tuple[str, str, str]:
    """id, fact and domain: they go into tables, logs and reports, so they are short and printable."""
    for name in _NAMES:
        if name not in fields:
            continue
        value = _not_blank(fields[name], f"Field {name!r}", name)
        if len(value) > limits.max_name_chars:
            raise LineProblem(
                "wrong_name", f"Field {name!r} has more than {limits.max_name_chars} characters.", name
            )
        if any(unicodedata.category(char) == "Cc" for char in value):
            raise LineProblem("wrong_name", f"Field {name!r} must not hold control characters.", name)
    id_ = fields.get("id", f"line-{line}")
    return id_, fields.get("fact", id_), fields.get("domain", "")
