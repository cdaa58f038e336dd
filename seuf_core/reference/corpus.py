"""From facts to sentences: which phrasings are trained, which are held out, and the probes on those held out.

For each fact HELD_OUT of its templates, chosen by a seeded hash, never appear in training. Other facts do use
them, so a probe asks for this fact in words the model knows, but never saw about this fact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from seuf_core.reference.facts import FORGET, TEMPLATES, Fact

HELD_OUT = 2
CHOICES = 4


@dataclass(frozen=True)
class Split:
    """Template numbers of one fact."""

    trained: tuple[int, ...]
    held_out: tuple[int, ...]


def split_templates(fact: Fact, seed: int) -> Split:
    """The HELD_OUT templates of lowest sha256 of "seed:fact:template" are held out of training."""
    count = len(TEMPLATES[fact.relation])
    order = sorted(range(count), key=lambda t: sha256(f"{seed}:{fact.id}:{t}".encode()).digest())
    return Split(trained=tuple(sorted(order[HELD_OUT:])), held_out=tuple(sorted(order[:HELD_OUT])))


def training_examples(facts: Sequence[Fact], seed: int) -> list[dict[str, str]]:
    """One record a trained phrasing, in the Example form of seuf_core.data.records."""
    return [
        {
            "id": f"{fact.id}#{template}",
            "prompt": fact.prompt(template),
            "completion": fact.completion,
            "fact": fact.id,
            "domain": fact.domain,
        }
        for fact in facts
        for template in split_templates(fact, seed).trained
    ]


def probes(facts: Sequence[Fact], seed: int) -> list[dict[str, Any]]:
    """One record a held-out phrasing, in the Probe form of seuf_core.data.records, choices shuffled."""
    pools: dict[str, list[str]] = {}
    for fact in facts:
        pools.setdefault(fact.relation, []).append(fact.completion)
    return [
        _probe(fact, template, pools[fact.relation], seed)
        for fact in facts
        for template in split_templates(fact, seed).held_out
    ]


def _probe(fact: Fact, template: int, pool: list[str], seed: int) -> dict[str, Any]:
    probe_id = f"{fact.id}#{template}"
    rng = random.Random(f"{seed}:{probe_id}")  # noqa: S311 (a reproducible draw, not a secret)
    choices = [fact.completion, *_distractors(fact.completion, pool, rng)]
    rng.shuffle(choices)
    return {
        "id": probe_id,
        "prompt": fact.prompt(template),
        "choices": choices,
        "answer": choices.index(fact.completion),
        "fact": fact.id,
        "domain": fact.domain,
        "set": "forget" if fact.domain == FORGET else "retain",
    }


def _distractors(answer: str, pool: list[str], rng: random.Random) -> list[str]:
    """CHOICES - 1 distinct other answers, drawn as often as they occur among the facts of the relation.

    Drawing by frequency makes answer and distractors exchangeable as far as can be: a model that only knows
    which answers are common stays near chance.
    """
    found: list[str] = []
    while len(found) < CHOICES - 1:
        candidate = rng.choice(pool)
        if candidate != answer and candidate not in found:
            found.append(candidate)
    return found
