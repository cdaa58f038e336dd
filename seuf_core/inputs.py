"""What a job is given, checked and split before any weight is loaded. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seuf_core.checkpoint.inspect import ModelFacts, inspect_model
from seuf_core.checkpoint.manifest import sha256_file
from seuf_core.data.parts import Parts, sample, split_records
from seuf_core.data.reader import read_examples, read_probes
from seuf_core.data.records import Example, Probe, probe_of
from seuf_core.errors import DataError
from seuf_core.families import require_experts
from seuf_core.method import Method
from seuf_core.observer import Observer

# Enough probes a side that the selection figure has a standard error of about .04; more cost time at every look.
SELECTION_PROBES = 150


@dataclass(frozen=True)
class Inputs:
    """Everything read and split, before a weight is loaded."""

    facts: ModelFacts
    forget: Parts[Example]
    retain: Parts[Example] | None
    selection_probes: list[Probe]
    test_probes: list[Probe]
    fingerprint: str


def read_inputs(
    model: Path,
    forget: Path,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    observer: Observer,
) -> Inputs:
    """Check and split everything a job is given, before any weight is loaded.

    Raises:
        DataError, ModelError, MethodError: naming the offender, the rule and the fix.
    """
    observer.phase("validating", 0, 1)
    facts = inspect_model(model)
    if method.selects_experts:
        require_experts(facts.model_type, facts.moe_layers)
    method.check_retain(given=retain is not None)
    shares = (method.splits.train, method.splits.selection, method.splits.test)
    forget_parts = split_records(read_examples(forget), method.seed, shares)
    retain_parts = split_records(read_examples(retain), method.seed, shares) if retain else None
    given = _usable_probes(read_probes(evaluation)) if evaluation else []
    sides = [
        _probes("forget", given, forget_parts, method.seed, shares),
        _probes("retain", given, retain_parts, method.seed, shares),
    ]
    if any(parts.shared for parts in (forget_parts, retain_parts, *sides) if parts is not None):
        _warn(
            observer,
            "too_few_facts_to_split",
            "A set is too small to hold facts back: its figures are measured on facts the training saw.",
        )
    if not sides[1].selection:
        _warn(
            observer,
            "no_retain_probes",
            "Nothing measures what should be kept, so max_retain_drop bounds nothing: give a retain set.",
        )
    chosen = [probe for side in sides for probe in sample(side.selection, SELECTION_PROBES, method.seed)]
    test = [probe for side in sides for probe in side.test]
    observer.phase("validating", 1, 1)
    fingerprint = _fingerprint(facts, [forget, retain, evaluation], method)
    return Inputs(facts, forget_parts, retain_parts, chosen, test, fingerprint)


def _probes(
    name: Literal["forget", "retain"],
    given: list[Probe],
    examples: Parts[Example] | None,
    seed: int,
    shares: tuple[float, float, float],
) -> Parts[Probe]:
    """One side's probes: those given, or else its examples. Each side is split by itself, so that none is empty."""
    mine = [probe for probe in given if probe.set == name]
    if mine:
        return split_records(mine, seed, shares)
    if examples is None:
        return Parts([], [], [], shared=False)
    train, selection, test = (
        [probe_of(example, name) for example in part]
        for part in (examples.train, examples.selection, examples.test)
    )
    return Parts(train, selection, test, examples.shared)


def _warn(observer: Observer, code: str, message: str) -> None:
    observer.event("warning", {"code": code, "message": message})


def _usable_probes(probes: list[Probe]) -> list[Probe]:
    if not any(probe.set == "forget" for probe in probes):
        raise DataError(
            "no_forget_probes",
            "The evaluation set has no probe with set forget, so forgetting cannot be measured.",
            'Add probes with "set": "forget".',
            "/evaluation_set",
        )
    return probes


def _fingerprint(facts: ModelFacts, files: list[Path | None], method: Method) -> str:
    digest = hashlib.sha256(facts.digest.encode())
    for file in files:
        digest.update(sha256_file(file).encode() if file else b"-")
    digest.update(json.dumps(method.model_dump(mode="json"), sort_keys=True).encode())
    return digest.hexdigest()
