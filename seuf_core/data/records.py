"""Forget, retain and evaluation sets: what a line may hold, and one streaming reader for service and library.

Torch-free. A set is JSON Lines in strict UTF-8. A forget or retain line is an `Example`, an evaluation line
a `Probe`. `RecordReader` takes bytes in pieces of any size and holds at most one line of them, so that a
64 MiB upload needs 1 MiB. Messages name line, field and rule, never the text: a forget set must not reach
a log.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seuf_core.data.lines import LineProblem, parse_line
from seuf_core.errors import DataError

Purpose = Literal["forget", "retain", "evaluation"]
Split = Literal["train", "selection", "test"]

ERRORS_KEPT = 20
READ_BYTES = 1 << 20
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
    """Bounds of one file. Bytes are of the file as sent; depth counts nested objects and arrays."""

    max_bytes: int = 64 << 20
    max_line_bytes: int = 1 << 20
    max_examples: int = 100_000
    max_depth: int = 8
    max_name_chars: int = 256  # of an id, a fact, a domain
    max_choices: int = 64


@dataclass(frozen=True, slots=True)
class LineError:
    """One broken rule. `line` counts from 1, blank lines included; 0 is the file as a whole."""

    line: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What a file holds. `examples` counts its valid lines only; `errors` are the first of `error_count`.

    Attributes:
        facts: distinct facts among the examples.
        tokens_estimate: UTF-8 bytes of all texts / 4.
        sha256: of the bytes as fed, in hex.
    """

    purpose: Purpose
    examples: int
    facts: int
    lines: int
    bytes: int
    sha256: str
    tokens_estimate: int
    errors: tuple[LineError, ...]
    error_count: int

    @property
    def ok(self) -> bool:
        """Whether the file can be used: at least one example and no error."""
        return self.error_count == 0


Record = Example | Probe


class RecordReader:
    """Reads one file, fed in pieces: `feed` bytes as they arrive, `finish` once.

    Memory: at most limits.max_line_bytes + the longest piece fed, + the ids and facts of the file.
    """

    def __init__(
        self,
        purpose: Purpose,
        limits: Limits | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        """
        Args:
            purpose: which kind of line is expected.
            limits: bounds; the defaults of Limits when None.
            on_record: called with every valid Example (forget, retain) or Probe (evaluation), in file order.
        """
        self.purpose = purpose
        self.limits = limits or Limits()
        self.on_record = on_record
        self._digest = hashlib.sha256()
        self._pending = bytearray()
        self._overlong = False
        self._lines = self._bytes = self._text_bytes = self._examples = self._error_count = 0
        self._lines_by_id: dict[str, int] = {}
        self._facts: set[str] = set()
        self._errors: list[LineError] = []

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; lines may be cut anywhere.

        Raises:
            DataError: file_too_large, as soon as the bytes pass limits.max_bytes: stop reading then.
        """
        self._bytes += len(piece)
        if self._bytes > self.limits.max_bytes:
            raise DataError(
                "file_too_large",
                f"The file has more than {self.limits.max_bytes} bytes.",
                "Split it, or raise the limit.",
            )
        self._digest.update(piece)
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            self._collect(piece[start:end])
            self._end_line()
            start = end + 1
        self._collect(piece[start:])

    def finish(self) -> FileSummary:
        """Take the last line, which needs no newline, and give the result. Call once."""
        if self._pending or self._overlong:
            self._end_line()
        if self._examples == 0 and self._error_count == 0:
            self._error(0, "no_examples", "The file has no example: give at least one line.")
        return FileSummary(
            purpose=self.purpose,
            examples=self._examples,
            facts=len(self._facts),
            lines=self._lines,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            tokens_estimate=-(-self._text_bytes // BYTES_PER_TOKEN),
            errors=tuple(self._errors),
            error_count=self._error_count,
        )

    def _collect(self, part: bytes) -> None:
        if self._overlong:
            return
        if len(self._pending) + len(part) > self.limits.max_line_bytes:
            self._overlong = True
        else:
            self._pending += part

    def _end_line(self) -> None:
        self._lines += 1
        line, overlong = bytes(self._pending), self._overlong
        self._pending.clear()
        self._overlong = False
        try:
            if overlong:
                limit = self.limits.max_line_bytes
                raise LineProblem("line_too_long", f"The line has more than {limit} bytes: split the text.")
            # JSON's own white space, and nothing else, makes a blank line or pads a full one.
            if line := line.strip(b" \t\r"):
                self._take(line)
        except LineProblem as problem:
            self._error(self._lines, problem.code, problem.message)

    def _take(self, line: bytes) -> None:
        if self._examples >= self.limits.max_examples:
            limit = self.limits.max_examples
            raise LineProblem("too_many_examples", f"The file has more than {limit} examples: split it.")
        fields = parse_line(line, first=self._lines == 1, max_depth=self.limits.max_depth)
        make: Callable[[dict[str, Any], int, Limits], Record]
        make = _probe if self.purpose == "evaluation" else _example
        record = make(fields, self._lines, self.limits)
        if (earlier := self._lines_by_id.setdefault(record.id, self._lines)) != self._lines:
            raise LineProblem("duplicate_id", f"The id is the same as on line {earlier}: ids must differ.")
        self._examples += 1
        self._facts.add(record.fact)
        texts = record.choices if isinstance(record, Probe) else (record.completion, record.alternative)
        self._text_bytes += sum(len(text.encode()) for text in (record.prompt, *texts))
        if self.on_record is not None:
            self.on_record(record)

    def _error(self, line: int, code: str, message: str) -> None:
        self._error_count += 1
        if len(self._errors) < ERRORS_KEPT:
            self._errors.append(LineError(line, code, message))


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


def read_examples(path: Path, limits: Limits | None = None) -> list[Example]:
    """The examples of a forget or retain file, in file order.

    Raises:
        DataError: set_not_found, file_too_large, or invalid_set with the first errors and their lines.
    """
    return [record for record in _read(path, "forget", limits or Limits()) if isinstance(record, Example)]


def read_probes(path: Path, limits: Limits | None = None) -> list[Probe]:
    """The probes of an evaluation file, in file order. Raises as read_examples does."""
    return [record for record in _read(path, "evaluation", limits or Limits()) if isinstance(record, Probe)]


def _read(path: Path, purpose: Purpose, limits: Limits) -> list[Record]:
    if not path.is_file():
        raise DataError("set_not_found", f"{path} is not a file.", "Give the path of a JSON Lines file.")
    records: list[Record] = []
    reader = RecordReader(purpose, limits, records.append)
    with path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            reader.feed(piece)
    summary = reader.finish()
    if not summary.ok:
        raise invalid_set(path.name, summary)
    return records


def invalid_set(name: str, summary: FileSummary) -> DataError:
    """The error for a file that broke rules: its first three errors, and the count of all."""
    first = " ".join(
        f"Line {error.line}: {error.message}" if error.line else error.message for error in summary.errors[:3]
    )
    count = summary.error_count
    return DataError(
        "invalid_set",
        f"{name} has {count} error{'s' if count > 1 else ''}. {first}",
        "Correct the lines and try again.",
    )


_NAMES = ("id", "fact", "domain")
_FORMS = (("prompt", "completion"), ("text",), ("question", "answer"))
_EXAMPLE_FIELDS = (*_NAMES, *(name for form in _FORMS for name in form), "alternative")
_PROBE_FIELDS = (*_NAMES, "prompt", "choices", "answer", "set")


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
        raise LineProblem("wrong_type", "Field 'prompt' must be a string.")
    alternative = _text(fields, "alternative") if "alternative" in fields else ""
    if alternative and alternative.strip() == completion.strip():
        raise LineProblem("same_alternative", f"Field 'alternative' is the same text as {form[-1]!r}.")
    id_, fact, domain = _names(fields, line, limits)
    return Example(id_, prompt, completion, fact, domain, alternative)


def _probe(fields: dict[str, Any], line: int, limits: Limits) -> Probe:
    _only_known(fields, _PROBE_FIELDS)
    prompt, choices = _text(fields, "prompt"), _choices(fields, limits)
    answer, side = fields.get("answer"), fields.get("set")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise LineProblem(
            "wrong_answer", f"Field 'answer' must be a choice's index, 0 to {len(choices) - 1}."
        )
    if side != "forget" and side != "retain":
        raise LineProblem("wrong_set", 'Field \'set\' must be "forget" or "retain".')
    id_, fact, domain = _names(fields, line, limits)
    return Probe(id_, prompt, choices, answer, fact, domain, side)


def _only_known(fields: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            shown = name if len(name) <= 40 else name[:40] + "..."
            raise LineProblem("unknown_field", f"Field {shown!r} is not known: use {', '.join(known)}.")


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise LineProblem("missing_field", f"Field {name!r} is missing.")
    return _not_blank(fields[name], f"Field {name!r}")


def _not_blank(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise LineProblem("wrong_type", f"{what} must be a string.")
    if not value.strip():
        raise LineProblem("blank_text", f"{what} must not be blank.")
    return value


def _choices(fields: dict[str, Any], limits: Limits) -> tuple[str, ...]:
    value = fields.get("choices")
    if not isinstance(value, list) or not 2 <= len(value) <= limits.max_choices:
        raise LineProblem("wrong_choices", f"Field 'choices' must list 2 to {limits.max_choices} strings.")
    choices = tuple(_not_blank(choice, f"Choice {number}") for number, choice in enumerate(value))
    if len(set(choices)) < len(choices):
        raise LineProblem("wrong_choices", "Two choices are the same: a probe needs one true answer.")
    return choices


def _names(fields: dict[str, Any], line: int, limits: Limits) -> tuple[str, str, str]:
    """id, fact and domain: they go into tables, logs and reports, so they are short and printable."""
    for name in _NAMES:
        if name not in fields:
            continue
        value = _not_blank(fields[name], f"Field {name!r}")
        if len(value) > limits.max_name_chars:
            raise LineProblem(
                "wrong_name", f"Field {name!r} has more than {limits.max_name_chars} characters."
            )
        if any(unicodedata.category(char) == "Cc" for char in value):
            raise LineProblem("wrong_name", f"Field {name!r} must not hold control characters.")
    id_ = fields.get("id", f"line-{line}")
    return id_, fields.get("fact", id_), fields.get("domain", "")
