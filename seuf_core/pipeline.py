"""A job from its inputs to a checkpoint: the one path that library, command and service share.

    forget set -> parts -> affinity [L, E] -> selection -> training on the base -> best step -> metrics -> checkpoint

Each arrow is a function below; each value can be shown and tested by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seuf_core.attribution.scores import score_experts
from seuf_core.attribution.selection import Selection, coverage, first_choice, selections
from seuf_core.attribution.stability import Stability, stability
from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.checkpoint.copying import Share
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.manifest import Manifest
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.errors import Cancelled, WriteError
from seuf_core.evaluate.probes import score_probes, summarise
from seuf_core.inputs import read_inputs
from seuf_core.job import Job, open_job
from seuf_core.method import Method
from seuf_core.moe.disk import round_to_disk
from seuf_core.moe.routing import can_mask, experts_masked
from seuf_core.moe.trail import Trail
from seuf_core.observer import Observer, Silent
from seuf_core.passes import open_test_pass
from seuf_core.plan.measure import Recorder, compare
from seuf_core.planning import Place, Planning, device_peak
from seuf_core.search import Found, search
from seuf_core.unlearning.scopes import assign
from seuf_core.version import __version__


@dataclass(frozen=True)
class Attributed:
    """Scores [L, E], what they were made from, and how stable they are.

    candidates: what may be trained, the smallest first; each later one holds those before it. selection: the one
    that is trained, or would be. forget: routing of the forget set, from which its coverage follows.
    """

    score: str
    matrix: torch.Tensor
    layers: tuple[int, ...]
    stability: Stability
    candidates: tuple[Selection, ...]
    selection: Selection
    forget: RoutingStatistics

    @property
    def coverage(self) -> float:
        """Share of the positions that predict a forget answer which a selected expert sees."""
        return coverage(self.forget, self.selection)

    def chosen(self) -> dict[str, Any]:
        """The selection and its coverage, as plain JSON."""
        return {"experts": [asdict(target) for target in self.selection], "coverage": self.coverage}

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

    attribution: see `Attributed.as_dict`; None for a scope without experts. selection: the trained experts.
    metrics: rows {stage, set, domain, name, value, n, chance}, stage before, after, before_masked, after_masked,
        all on the test part. chosen: the winning step {learning_rate, step, ...selection figures}.
    checkpoint: the folder written (None when it was not asked for). seconds: wall clock by phase.
    plan: what was planned once the targets were known (seuf_core.plan.planner.Plan.as_dict); actual: what happened
        (seuf_core.plan.measure.Actual.as_dict).
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
    plan: dict[str, Any] | None = None
    actual: dict[str, Any] | None = None


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
    memory: int | str | None = None,
    share: Share = "reflink",
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
        memory: what the job may use, in bytes or such as "6GB"; None = SEUF_MEMORY, else what is free. The plan keeps
            as many layers in memory as fit, and reads the others when they are needed.
        share: what unchanged shards may share with the base: see seuf_core.checkpoint.writer.write_checkpoint.

    Raises:
        DataError, ModelError, MethodError: inputs that cannot be used; nothing was written to `out`.
        Cancelled: the observer cancelled; the training checkpoint in `work` is whole.
        WriteError: the checkpoint could not be written; nothing is at `out`.
    """
    method, observer = method or Method(), observer or Silent()
    if out is not None and os.path.lexists(out):  # the writer would say so too, after the training
        raise WriteError("output_exists", f"{out} exists already.", "Remove it, or choose another folder.")
    with Recorder(device_peak) as recorder:
        recorder.phase("validating")
        inputs = read_inputs(model, forget, retain, evaluation, method, observer)
        place = Place.of(model, memory)
        job = open_job(model, inputs, method, observer, "suffix", place.device)
        job = replace(job, trail=Trail(folder=work) if method.selects_experts else None)
        recorder.phase("planning")
        planning = Planning.of(job, place, work)
        recorder.phase("attributing")
        job, plan = planning.before(job)
        observer.event("plan", {"plan": plan.as_dict()})
        attributed = attribute(job, work) if method.selects_experts else None
        recorder.phase("unlearning")
        candidates = attributed.candidates if attributed else ((),)
        found = search(job, candidates, work, _announcing(job, attributed), planning.obeyed)
        job, plan = planning.for_targets(job, found.targets)
        recorder.phase("evaluating")
        metrics = measure(job, found, work)
        recorder.phase("publishing")
        changed = found.trainable.disk_tensors()
        manifest = _published(job, found, changed, out, share) if out is not None else None
    actual = recorder.actual
    shown = {"plan": plan.as_dict(), "actual": actual.as_dict()}
    observer.event("plan", {**shown, "comparison": compare(plan, actual).as_dict()})
    return UnlearnResult(
        attribution=replace(attributed, selection=found.selection).as_dict() if attributed else None,
        selection=[asdict(target) for target in found.selection],
        metrics=metrics,
        chosen={"learning_rate": found.rung.learning_rate, **found.rung.best.as_dict()},
        # By storage: a tied parameter is one, under however many names.
        parameters_changed=sum({tensor.data_ptr(): tensor.numel() for tensor in changed.values()}.values()),
        parameters_total=sum(parameter.numel() for parameter in job.view.model.parameters()),
        checkpoint=out,
        manifest=manifest,
        seconds={phase.name: phase.seconds for phase in actual.phases},
        **shown,
    )


def _published(
    job: Job, found: Found, changed: dict[str, torch.Tensor], out: Path, share: Share
) -> Manifest:
    """Write the checkpoint, with method and selection in its manifest."""
    extra = {
        "method": job.method.model_dump(mode="json"),
        "selection": [asdict(target) for target in found.selection],
    }
    by, progress = f"seuf {__version__}", _publishing(job.observer)
    return write_checkpoint(job.folder, out, changed, by, extra, progress, share)


def _announcing(job: Job, attributed: Attributed | None) -> Callable[[Selection], None]:
    """Which experts are trained, as an event; a scope without experts has nothing to say."""

    def announce(selection: Selection) -> None:
        if attributed is not None:
            job.observer.event("selection", replace(attributed, selection=selection).chosen())

    return announce


def _publishing(observer: Observer) -> Callable[[int, int], None]:
    """Bytes written, to the observer; a cancelled write leaves nothing at its destination."""

    def progress(done: int, total: int) -> None:
        observer.phase("publishing", done, total)
        if observer.cancelled():
            raise Cancelled

    return progress


def attribute_only(
    model: Path,
    forget: Path,
    *,
    retain: Path | None = None,
    method: Method | None = None,
    observer: Observer | None = None,
) -> Attributed:
    """Score the experts and choose the targets as `unlearn` would, and train nothing.

    Raises:
        DataError, ModelError, MethodError: inputs that cannot be used, or a scope that selects no expert.
    """
    method, observer = (method or Method()).to_attribute(), observer or Silent()
    inputs = read_inputs(model, forget, retain, None, method, observer)
    return attribute(open_job(model, inputs, method, observer, "suffix"))


def attribute(job: Job, work: Path | None = None) -> Attributed:
    """Score every expert on the training parts and choose the targets.

    Args:
        work: folder for hidden states that are too many for memory; None = the system's temporary folder.
    """
    view, data, method = job.view, job.data, job.method
    scored = score_experts(
        view,
        data.forget,
        data.retain,
        method,
        lambda done, total: job.observer.phase("attributing", done, total),
        scratch=work,
        trail=job.trail,
    )

    candidates = selections(scored, method)
    attributed = Attributed(
        method.attribution,
        scored.matrix,
        view.layer_indices,
        stability(scored, view.num_experts_per_tok, lambda half: first_choice(half, method)),
        candidates,
        candidates[0],
        scored.forget,
    )
    job.observer.event("attribution", attributed.as_dict())
    return attributed


def measure(job: Job, found: Found, work: Path) -> list[dict[str, Any]]:
    """Test figures, looked at once: before, after, and both with the target experts masked out of the routing
    (where every layer keeps enough other experts).

    Leaves the model with the values of the best step merged in, rounded to what the files can hold.
    """
    probes, targets = job.test_probes, found.targets
    forward = open_test_pass(job, targets, work)
    masks = (False, True) if targets and can_mask(job.view, targets) else (False,)
    stages = [(name, mask) for name in ("before", "after") for mask in masks]
    rows: list[dict[str, Any]] = []
    index = read_index(job.folder)
    for done, (name, masked) in enumerate(stages):
        job.observer.phase("evaluating", done, len(stages))
        assign(found.trainable, found.initial if name == "before" else found.rung.values)
        found.trainable.merge()
        round_to_disk(found.trainable.disk_tensors(), index)
        with experts_masked(job.view, targets if masked else {}):
            scored = summarise(probes, score_probes(forward, probes))
        rows += [{"stage": f"{name}_masked" if masked else name, **row} for row in scored]
    job.observer.phase("evaluating", len(stages), len(stages))
    return rows
