"""What a job is given, checked and split before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seuf_core.checkpoint.inspect import ModelFacts, inspect_model
from seuf_core.data.parts import Parts, sample, split_records
from seuf_core.data.records import Example, Probe, read_examples, read_probes
from seuf_core.errors import DataError, MethodError
from seuf_core.evaluate.probes import probe_of
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
    if retain is None and method.needs_retain:
        why = f"retain_loss {method.retain_loss}" if method.retain_loss != "none" else "attribution contrast"
        raise MethodError(
            "retain_set_required",
            f"{why} needs a retain set, and none was given.",
            "Give one, or use objective gradient_ascent with attribution affinity.",
            "/retain_set",
        )
    shares = (method.splits.train, method.splits.selection, method.splits.test)
    forget_parts = split_records(read_examples(forget), method.seed, shares)
    retain_parts = split_records(read_examples(retain), method.seed, shares) if retain else None
    if evaluation is not None:
        probes = split_records(_usable_probes(read_probes(evaluation)), method.seed, shares)
        selection_probes, test_probes, shared = probes.selection, probes.test, probes.shared
    else:
        pairs: list[tuple[Literal["forget", "retain"], Parts[Example] | None]]
        pairs = [("forget", forget_parts), ("retain", retain_parts)]
        selection_probes = [probe_of(e, name) for name, parts in pairs if parts for e in parts.selection]
        test_probes = [probe_of(e, name) for name, parts in pairs if parts for e in parts.test]
        shared = False
    if shared or forget_parts.shared or (retain_parts is not None and retain_parts.shared):
        observer.event(
            "warning",
            {
                "code": "too_few_facts_to_split",
                "message": "A set is too small to hold facts back: its figures are "
                "measured on facts the training saw.",
            },
        )
    chosen = [
        probe
        for name in ("forget", "retain")
        for probe in sample([p for p in selection_probes if p.set == name], SELECTION_PROBES, method.seed)
    ]
    observer.phase("validating", 1, 1)
    fingerprint = _fingerprint(facts, [forget, retain, evaluation], method)
    return Inputs(facts, forget_parts, retain_parts, chosen, test_probes, fingerprint)


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
        digest.update(hashlib.sha256(file.read_bytes() if file else b"-").digest())
    digest.update(json.dumps(method.model_dump(mode="json"), sort_keys=True).encode())
    return digest.hexdigest()
