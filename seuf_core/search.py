"""How many experts and how strong: the search behind `experts: auto` and `strength: auto`.

Outer: selections that grow, the smallest first. Inner: learning rates, the strongest first. Every run starts from
the base weights and is judged on the selection part by the rule that is fixed before (unlearning.rule). A run that
went past the bound is eased: less of its change is kept. The search ends with the first run that has forgotten
enough, and the best of all wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from seuf_core.attribution.selection import Selection, by_layer
from seuf_core.checkpoint.index import read_index
from seuf_core.errors import Cancelled, MethodError, ModelError
from seuf_core.evaluate.probes import score_probes
from seuf_core.job import Job
from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.passes import Passes, Targets, open_passes
from seuf_core.unlearning.loop import Run, RungResult, train_rung
from seuf_core.unlearning.objectives import build_objective
from seuf_core.unlearning.rule import FORGOTTEN, Look, Quality, order, quality_of
from seuf_core.unlearning.scopes import Trainable, Values, assign, build_trainable, snapshot

# Shares of a change that are tried where all of it is past the bound, the largest first.
EASED_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class Found:
    """The winner: what was trained, from which values, and the run whose best step is the result."""

    selection: Selection
    trainable: Trainable
    initial: Values
    rung: RungResult

    @property
    def targets(self) -> dict[int, tuple[int, ...]]:
        """Decoder layer -> trained experts."""
        return by_layer(self.selection)


def search(
    job: Job,
    candidates: Sequence[Selection],
    work: Path,
    announce: Callable[[Selection], None],
    planned: Callable[[Job, Targets], Job] = lambda job, _: job,
) -> Found:
    """Train the candidates in turn until one has forgotten; the best step by the rule wins.

    Args:
        candidates: selections that grow, `((),)` for a scope without experts. `strength: fixed` takes the first.
        work: folder for the training checkpoints of every run.
        announce: hears which selection is trained next, and at the end which one was best.
        planned: the job with its weights kept as training these targets needs.

    Raises:
        MethodError: `nothing_forgotten`, when the base itself is the best that the bound allows; `diverged`, when
            a run of fixed strength breaks; see `build_trainable` and `build_objective` for what a method may lack.
        ModelError: `no_numbers`, when the base cannot be measured.
        Cancelled: when the observer asks for it; every training checkpoint in `work` is whole.
    """
    candidates = _trained(job.method, candidates)
    runs = len(candidates) * job.method.rungs
    base: Quality | None = None
    best: Found | None = None
    for place, selection in enumerate(candidates):
        announce(selection)
        job = planned(job, by_layer(selection))
        passes = open_passes(job, by_layer(selection), work)
        base = base or _base_quality(job, passes)
        found = _attempt(job, passes, selection, base, work, place * job.method.rungs, runs)
        if best is None or order(found.rung.best) < order(best.rung.best):
            best = found
        if _has_forgotten(found.rung):
            break
    assert best is not None  # there is at least one candidate
    announce(best.selection)
    if best.rung.best.step == 0:
        raise MethodError(
            "nothing_forgotten",
            f"No step of any run forgot anything within max_retain_drop {job.method.max_retain_drop}.",
            "Raise max_retain_drop or steps, give other learning rates, or train more experts.",
            "/method",
        )
    return best


def _trained(method: Method, candidates: Sequence[Selection]) -> Sequence[Selection]:
    """The candidates that the method can train: of fixed strength the first, else those whose experts a given
    `rmu_layer` sees. The first in any case: where it cannot be had, `build_objective` says why."""
    if method.strength == "fixed":
        return candidates[:1]
    if method.objective not in HIDDEN_STATE_OBJECTIVES or method.rmu_layer == "auto":
        return candidates
    highest = method.rmu_layer
    seen = [chosen for chosen in candidates[1:] if max(target.layer for target in chosen) <= highest]
    return [candidates[0], *seen]


def _quality(job: Job, passes: Passes) -> Quality:
    return quality_of(job.selection_probes, score_probes(passes.looks, job.selection_probes))


def _base_quality(job: Job, passes: Passes) -> Quality:
    base = _quality(job, passes)
    if not base.finite:
        raise ModelError(
            "no_numbers",
            f"The base model, in {job.view.model.dtype}, gives no finite number for a probe of the selection part.",
            "Use a checkpoint in bfloat16 or float32 that answers every probe.",
            "/model",
        )
    return base


def _attempt(
    job: Job, passes: Passes, selection: Selection, base: Quality, work: Path, first: int, runs: int
) -> Found:
    """One selection at every rate that may still help; its best run.

    Its parameters are its own and the model itself stays the base, so that nothing of it reaches the next attempt.
    Only the best run's values are kept.
    """
    method, targets = job.method, by_layer(selection)
    on_disk = read_index(job.folder).tensors
    trainable = build_trainable(
        job.view, method, targets, on_disk=on_disk, retain=job.data.retain, observer=job.observer
    )
    initial = snapshot(trainable)
    run = Run(
        method=method,
        trainable=trainable,
        initial=initial,
        objective=build_objective(passes.training, method, job.data, targets),
        evaluate=lambda: _quality(job, passes),
        base=base,
        sizes=(len(job.data.forget), len(job.data.retain)),
        work=work,
        # On another machine a near tie may select other experts: their training is not this one's.
        fingerprint=f"{job.inputs.fingerprint}/{sorted(targets.items())}",
        runs=runs,
        observer=job.observer,
    )
    best: RungResult | None = None
    for rung, learning_rate in enumerate(method.rates(rms(initial)), start=first):
        result = ease(run, rung, train_rung(run, rung, learning_rate))
        shown = {"rung": rung, "learning_rate": learning_rate, "experts": [asdict(t) for t in selection]}
        job.observer.event("rung", {**shown, **result.best.as_dict()})
        _refuse_unfinished(method, result)
        if best is None or order(result.best) < order(best.best):
            best = result
        # Within the bound from end to end and still not forgotten: a weaker rate would only get less far.
        if _has_forgotten(result) or (_finished(method, result) and result.within(method.max_retain_drop)):
            break
    assert best is not None  # there is at least one rate
    return Found(selection, trainable, initial, best)


def _finished(method: Method, rung: RungResult) -> bool:
    """Whether a run reached its last step; one that gives no numbers ends before."""
    return rung.looks[-1].step == method.steps


def _refuse_unfinished(method: Method, rung: RungResult) -> None:
    """A run of fixed strength that could not reach its last step has no result."""
    if method.strength == "fixed" and not _finished(method, rung):
        raise MethodError(
            "diverged",
            f"At learning rate {rung.learning_rate:g} the model gives no finite numbers before step {method.steps}.",
            "Give a smaller learning_rate or fewer steps, or use strength auto.",
            "/method/learning_rate",
        )


def ease(run: Run, rung: int, result: RungResult) -> RungResult:
    """The run with as much of its change as the bound allows, where that is better than its best step.

    Training passes the bound in a few steps and does not come back to it, while what it learnt to forget grows on.
    On the straight line from the base to the last step, forgetting outlasts the damage (docs/explanation/method.md).
    Mixing base and trained weights until the retain quality is back is the calibration of arXiv 2406.09179.

    Raises:
        Cancelled: when the observer asks for it; the training checkpoint of the run is whole, and finished.
    """
    bound = run.method.max_retain_drop
    if run.method.strength == "fixed" or _has_forgotten(result) or result.within(bound):
        return result
    for share in EASED_SHARES:
        if run.observer.cancelled():
            raise Cancelled
        values = {
            name: torch.lerp(run.initial[name], last.to(run.initial[name]), share)
            for name, last in result.last.items()
        }
        assign(run.trainable, values)
        with run.trainable.attached():
            quality = run.evaluate()
        look = Look(result.looks[-1].step, quality, quality.retain_drop(run.base), share)
        better = quality.finite and look.within(bound) and order(look) < order(result.best)
        shown = {"rung": rung, "best": better, "collapsed": False, **look.as_dict()}
        run.observer.event("look", shown)
        if better:
            return replace(result, best=look, values=values)
        if quality.finite and look.within(bound):
            break
    return result


def _has_forgotten(rung: RungResult) -> bool:
    return rung.best.quality.fell_to(FORGOTTEN, rung.looks[0].quality)


def rms(values: Values) -> float:
    """Root mean square of all weights that are trained, leaving out those that begin at 0 (LoRA's second half)."""
    squares, count = torch.zeros((), dtype=torch.float64), 0
    for value in values.values():
        if bool(value.any()):
            squares += value.double().square().sum().cpu()
            count += value.numel()
    return float((squares / max(count, 1)).sqrt())
