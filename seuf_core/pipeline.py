"""A job from its inputs to a checkpoint: the one path that library, command and service share.

    forget set -> parts -> affinity [L, E] -> selection -> training on the base -> best step -> metrics -> checkpoint

Each arrow is a function below; each value can be shown and tested by itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seuf_core import __version__
from seuf_core.attribution.affinity import Stability, contrast, random_scores, routing_statistics, stability
from seuf_core.attribution.selection import (
    SelectedExpert,
    by_layer,
    coverage,
    random_in_same_layers,
    select,
)
from seuf_core.checkpoint.inspect import ModelFacts, inspect_model
from seuf_core.checkpoint.manifest import Manifest
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.data.batches import Encoded, encode_examples, length_bucketed
from seuf_core.data.parts import Parts, sample, split_records
from seuf_core.data.records import Example, Probe, read_examples, read_probes
from seuf_core.errors import DataError, MethodError
from seuf_core.evaluate.probes import EncodedProbe, encode_probes, probe_of, score_probes, summarise
from seuf_core.method import Method
from seuf_core.moe.routing import experts_masked
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.observer import Observer, Silent
from seuf_core.unlearning.loop import Run, RungResult, train_rung
from seuf_core.unlearning.objectives import TrainingData, build_objective
from seuf_core.unlearning.rule import Quality, order, quality_of
from seuf_core.unlearning.scopes import ExpertScope, Trainable, WholeModelScope, assign, snapshot

# Enough probes a side that the selection figure has a standard error of about .04; more cost time at every look.
SELECTION_PROBES = 150
# A forget score (recognised above chance, plus said) of this or less ends the ladder: a weaker rate could win little.
FORGOTTEN = 0.1


@dataclass(frozen=True)
class Attributed:
    """Scores [L, E], what they were made from, and how stable they are."""

    score: str
    matrix: torch.Tensor
    layers: tuple[int, ...]
    stability: Stability
    selection: tuple[SelectedExpert, ...]
    coverage: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: score, layers, matrix, stability, coverage, selection."""
        return {
            "score": self.score,
            "layers": list(self.layers),
            "matrix": self.matrix.tolist(),
            "stability": asdict(self.stability),
            "coverage": self.coverage,
            "selection": [asdict(target) for target in self.selection],
        }


@dataclass(frozen=True)
class UnlearnResult:
    """What a job leaves behind.

    attribution: see `Attributed.as_dict`; None for scope full. selection: the trained experts.
    metrics: rows {stage, set, domain, name, value, n, chance}, stage before, after, before_masked, after_masked,
        all on the test part. chosen: the winning step {learning_rate, step, ...selection figures}.
    checkpoint: the folder written (None when it was not asked for). seconds: wall clock by phase.
    """

    attribution: dict[str, Any] | None
    selection: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    chosen: dict[str, Any]
    parameters_changed: int
    parameters_total: int
    checkpoint: Path | None
    manifest: Manifest | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Inputs:
    """Everything read and split, before a weight is loaded."""

    facts: ModelFacts
    forget: Parts[Example]
    retain: Parts[Example] | None
    selection_probes: list[Probe]
    test_probes: list[Probe]
    fingerprint: str


def unlearn(
    model: Path,
    forget: Path,
    out: Path | None,
    *,
    retain: Path | None = None,
    evaluation: Path | None = None,
    method: Method | None = None,
    work: Path,
    observer: Observer | None = None,
) -> UnlearnResult:
    """Make a model forget a set of examples, and write the result as an ordinary checkpoint.

    Args:
        model: folder of the base model (safetensors); it is only read.
        forget: JSON Lines of what to forget; retain: what to keep; evaluation: probes for both
            (formats: seuf_core.data.records). Without probes, the examples of the held-out parts are measured.
        out: folder to create for the checkpoint, or None to measure only.
        method: see seuf_core.method; None is the default preset.
        work: folder for training checkpoints. A second call with the same arguments continues from the last one
            and ends with bit-identical weights (CPU, same number of threads).
        observer: hears progress and may cancel.

    Raises:
        DataError, ModelError, MethodError: inputs that cannot be used; nothing was written to `out`.
        Cancelled: the observer cancelled; the training checkpoint in `work` is whole.
        WriteError: the checkpoint could not be written; nothing is at `out`.
    """
    method, observer = method or Method(), observer or Silent()
    clock = _Clock()
    inputs = read_inputs(model, forget, retain, evaluation, method, observer)
    clock.lap("validating")
    loaded, tokenizer = load(model)
    view = moe_view(loaded)
    data = _training_data(inputs, method, tokenizer, view, observer)
    attributed = None
    if method.scope != "full":
        attributed = attribute(view, data, method, observer)
    clock.lap("attributing")
    targets = by_layer(attributed.selection) if attributed else {}
    trainable: Trainable = (
        ExpertScope(view, targets, train_router=method.router == "train")
        if attributed
        else WholeModelScope(view)
    )
    initial = snapshot(trainable)
    winner = train(view, inputs, data, targets, trainable, method, tokenizer, work, observer)
    clock.lap("unlearning")
    metrics = _measure(
        view, inputs, targets, trainable, (initial, winner.values), method, tokenizer, observer
    )
    clock.lap("evaluating")
    changed = trainable.disk_tensors()
    manifest = None
    if out is not None:
        observer.phase("publishing", 0, 1)
        extra = {
            "method": method.model_dump(mode="json"),
            "selection": [asdict(t) for t in _selection(attributed)],
        }
        manifest = write_checkpoint(model, out, changed, created_by=f"seuf {__version__}", extra=extra)
        observer.phase("publishing", 1, 1)
    clock.lap("publishing")
    return UnlearnResult(
        attribution=attributed.as_dict() if attributed else None,
        selection=[asdict(target) for target in _selection(attributed)],
        metrics=metrics,
        chosen={"learning_rate": winner.learning_rate, **winner.best.as_dict()},
        parameters_changed=sum(tensor.numel() for tensor in changed.values()),
        parameters_total=sum(parameter.numel() for parameter in loaded.parameters()),
        checkpoint=out,
        manifest=manifest,
        seconds=clock.laps,
    )


def _selection(attributed: Attributed | None) -> tuple[SelectedExpert, ...]:
    return attributed.selection if attributed else ()


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 3), now


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


def load(model: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in the dtype it is stored in, in eval mode, and its tokenizer; from disk only, no remote code."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return loaded.to(device).eval(), tokenizer


def _training_data(
    inputs: Inputs, method: Method, tokenizer: PreTrainedTokenizerBase, view: MoEView, observer: Observer
) -> TrainingData:
    retain = inputs.retain.train if inputs.retain else []
    forget_encoded = encode_examples(tokenizer, inputs.forget.train, method.max_length)
    retain_encoded = encode_examples(tokenizer, retain, method.max_length)
    return TrainingData(forget_encoded, retain_encoded, view.model.config.pad_token_id or 0)


def attribute(view: MoEView, data: TrainingData, method: Method, observer: Observer) -> Attributed:
    """Score every expert on the training parts and choose the targets."""
    total = len(data.forget) + len(data.retain)

    def statistics(encoded: list[Encoded], offset: int) -> Any:
        batches = (b.to(view.model.device) for b in length_bucketed(encoded, 8192, data.pad_token_id))
        return routing_statistics(view, batches, lambda n: observer.phase("attributing", offset + n, total))

    forget = statistics(data.forget, 0)
    match method.attribution:
        case "contrast":
            scores = contrast(forget, statistics(data.retain, len(data.forget)))
        case "affinity":
            scores = forget.affinity
        case "random":
            scores = random_scores(len(view.layers), view.num_experts, method.seed)
    chosen = select(
        scores,
        forget,
        count=None if method.experts == "auto" else method.experts,
        spread=method.spread,
        min_coverage=method.coverage,
        max_experts=method.max_experts,
    )
    if method.scope == "random_expert":
        chosen = random_in_same_layers(chosen, scores, view.layer_indices, method.seed)
    attributed = Attributed(
        method.attribution,
        scores,
        view.layer_indices,
        stability(forget, view.num_experts_per_tok),
        chosen,
        coverage(forget, chosen),
    )
    observer.event("selection", {"experts": [asdict(t) for t in chosen], "coverage": attributed.coverage})
    return attributed


def train(
    view: MoEView,
    inputs: Inputs,
    data: TrainingData,
    targets: dict[int, tuple[int, ...]],
    trainable: Trainable,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    observer: Observer,
) -> RungResult:
    """Try the rates of the ladder from the same start until one has forgotten; the winner is the best step by the rule."""
    probes = encode_probes(tokenizer, inputs.selection_probes, method.max_length)

    def evaluate() -> Quality:
        return quality_of(probes, score_probes(view.model, probes))

    used = data if method.retain_loss != "none" else TrainingData(data.forget, [], data.pad_token_id)
    run = Run(
        method=method,
        trainable=trainable,
        initial=snapshot(trainable),
        objective=build_objective(view, method, used, targets),
        evaluate=evaluate,
        base=evaluate(),
        sizes=(len(used.forget), len(used.retain)),
        work=work,
        fingerprint=inputs.fingerprint,
        observer=observer,
    )
    rungs = []
    for rung, learning_rate in enumerate(method.ladder):
        rungs.append(train_rung(run, rung, learning_rate))
        observer.event("rung", {"rung": rung, "learning_rate": learning_rate, **rungs[-1].best.as_dict()})
        if rungs[-1].best.quality.forget_score <= FORGOTTEN:
            break
    winner = min(rungs, key=lambda result: order(result.best))
    if winner.best.step == 0:
        raise MethodError(
            "nothing_forgotten",
            f"No step of {len(rungs)} run(s) forgot more than the base within max_retain_drop {method.max_retain_drop}.",
            "Raise max_retain_drop or steps, give other learning rates, or train more experts.",
            "/method",
        )
    return winner


def _measure(
    view: MoEView,
    inputs: Inputs,
    targets: dict[int, tuple[int, ...]],
    trainable: Trainable,
    values: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    observer: Observer,
) -> list[dict[str, Any]]:
    """Test figures, looked at once: before, after, and both with the target experts masked out of the routing.

    Leaves the model with the winning values merged in.
    """
    probes = encode_probes(tokenizer, inputs.test_probes, method.max_length)
    rows: list[dict[str, Any]] = []
    stages = 4 if targets else 2
    for stage, chosen in zip(("before", "after"), values, strict=True):
        assign(trainable, chosen)
        trainable.merge()
        rows += _stage_rows(view, probes, stage)
        observer.phase("evaluating", len({row["stage"] for row in rows}), stages)
        if targets:
            with experts_masked(view, targets):
                rows += _stage_rows(view, probes, f"{stage}_masked")
            observer.phase("evaluating", len({row["stage"] for row in rows}), stages)
    return rows


def _stage_rows(view: MoEView, probes: list[EncodedProbe], stage: str) -> list[dict[str, Any]]:
    return [{"stage": stage, **row} for row in summarise(probes, score_probes(view.model, probes))]
