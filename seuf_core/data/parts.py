"""Train, selection and test parts of a job's data (torch-free).

Losses see train facts, the best step is chosen on selection facts, figures come from test facts. The split is
by a seeded hash of the fact, so all phrasings of a fact and all its probes fall on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from seuf_core.data.records import Example, Probe, split_of

T = TypeVar("T", Example, Probe)

# Below this many facts a part would be a handful; then all parts share all facts, and the job says so.
FEWEST_FACTS_TO_SPLIT = 20


@dataclass(frozen=True)
class Parts(Generic[T]):
    """The three parts of one set, each in file order; `shared` when the set was too small to split."""

    train: list[T]
    selection: list[T]
    test: list[T]
    shared: bool


def split_records(records: Sequence[T], seed: int, shares: tuple[float, float, float]) -> Parts[T]:
    """Split a set by fact."""
    facts = {record.fact for record in records}
    parts: dict[str, list[T]] = {"train": [], "selection": [], "test": []}
    for record in records:
        parts[split_of(record.fact, seed, shares)].append(record)
    if len(facts) < FEWEST_FACTS_TO_SPLIT or not all(parts.values()):
        everything = list(records)
        return Parts(everything, everything, everything, shared=True)
    return Parts(parts["train"], parts["selection"], parts["test"], shared=False)


def sample(records: Sequence[T], most: int, seed: int) -> list[T]:
    """At most `most` records, chosen by a seeded hash of their id, in file order."""
    if len(records) <= most:
        return list(records)
    ranked = sorted(records, key=lambda r: hashlib.sha256(f"{seed}:{r.id}".encode()).digest())
    kept = {id(record) for record in ranked[:most]}
    return [record for record in records if id(record) in kept]
