"""The training loop: one learning rate from the base weights to the best step, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seuf_core.data.batches import batch_indices
from seuf_core.errors import Cancelled
from seuf_core.method import Method
from seuf_core.moe.memory import within_memory
from seuf_core.observer import Observer
from seuf_core.unlearning.objectives import Objective, Terms
from seuf_core.unlearning.rule import GONE, Look, Quality, best
from seuf_core.unlearning.scopes import Trainable, Values, assign, snapshot
from seuf_core.unlearning.state import TrainingState, moments_of, restore_moments

# A run whose retain drop passes this many times the bound (and at least this much) does not come back.
COLLAPSE_FACTOR, COLLAPSE_DROP = 5.0, 0.15


@dataclass(frozen=True)
class RungResult:
    """One learning rate tried: all looks, the best within the bound (step 0 if nothing else) and its values.

    last: the values after the last step, within the bound or not.
    """

    learning_rate: float
    looks: tuple[Look, ...]
    best: Look
    values: Values
    last: Values

    def within(self, max_retain_drop: float) -> bool:
        """Whether every look was within the bound."""
        return all(look.within(max_retain_drop) for look in self.looks)


@dataclass(frozen=True)
class Run:
    """What every rung of a job shares.

    sizes: number of forget and retain training examples. base: selection figures before training.
    evaluate: selection figures of the model with the parameters attached.
    fingerprint: names inputs and method; a training checkpoint of another fingerprint is ignored.
    runs: how many rungs the job has at most, for progress.
    """

    method: Method
    trainable: Trainable
    initial: Values
    objective: Objective
    evaluate: Callable[[], Quality]
    base: Quality
    sizes: tuple[int, int]
    work: Path
    fingerprint: str
    runs: int
    observer: Observer


def train_rung(run: Run, rung: int, learning_rate: float) -> RungResult:
    """Train from the base weights at one constant rate, look every `evaluate_every` steps, keep the best step.

    Raises:
        Cancelled: when the observer asks for it, after a training checkpoint.
    """
    leaves = run.trainable.named_parameters()
    optimizer = optimizer_of(run, learning_rate)
    path = run.work / f"rung-{rung}.safetensors"
    fingerprint = f"{run.fingerprint}/{learning_rate!r}"
    state = TrainingState.load(path, fingerprint) or _start(run)
    assign(run.trainable, state.values)
    restore_moments(optimizer, leaves, state.moments)
    run.objective.load_state(state.objective)
    with run.trainable.attached():
        while not state.finished:
            terms = take_step(run, optimizer, state.step)
            state.step += 1
            if terms is None:
                _diverged(run, rung, learning_rate, state)
            else:
                _report(run, rung, learning_rate, state.step, terms)
            looked = state.step % run.method.evaluate_every == 0 or state.step == run.method.steps
            if looked and not state.finished:
                _look(run, rung, learning_rate, state)
            # Asked once a step: an answer that changed between saving and stopping would lose steps.
            cancelled = run.observer.cancelled()
            if state.finished or looked or cancelled:
                state.values, state.moments = snapshot(run.trainable), moments_of(optimizer, leaves)
                state.objective = run.objective.state()
                state.save(path, fingerprint)
            if cancelled and not state.finished:
                raise Cancelled
    looks = tuple(Look.from_dict(fields) for fields in state.looks)
    return RungResult(learning_rate, looks, _best(looks, run.method), state.best_values, state.values)


def _start(run: Run) -> TrainingState:
    first = Look(0, run.base, 0.0)
    return TrainingState(0, run.initial, {}, run.initial, [first.as_dict()])


def _best(looks: tuple[Look, ...], method: Method) -> Look:
    if method.strength == "fixed":
        return looks[-1]
    chosen = best(looks, method.max_retain_drop)
    return chosen if chosen is not None else looks[0]


def optimizer_of(run: Run, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over what is trained, at a constant rate."""
    leaves = run.trainable.named_parameters().values()
    # Weight decay moves weights that have no gradient, so it is 0 (docs/explanation/method.md).
    # fused: one pass over weight, gradient and moments instead of a dozen.
    return torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0, fused=True)


def take_step(run: Run, optimizer: torch.optim.Optimizer, step: int) -> Terms | None:
    """One optimiser step, inside `attached`; None, and nothing moved, when the loss is not a finite number.

    Raises:
        MethodError: `out_of_memory`, see `within_memory`.
    """
    method, (num_forget, num_retain) = run.method, run.sizes
    forget = batch_indices(num_forget, method.batch_size, method.seed, step)
    retain = batch_indices(num_retain, method.batch_size, method.seed + 1, step) if num_retain else []
    learnt, leaves = run.objective.state(), run.trainable.named_parameters().values()

    def differentiate() -> Terms | None:
        run.objective.load_state(learnt)  # a pass that ran out of memory may have taken its step already
        optimizer.zero_grad(set_to_none=True)
        terms = run.objective(forget, retain)
        loss = terms.total(method)
        if not bool(loss.isfinite()):
            return None
        if loss.requires_grad:  # not where no token of the batch goes to a target
            loss.backward()
        for leaf in leaves:
            # Nothing reached it. AdamW would skip it, but of a gradient of 0 its averages still move it.
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return terms

    terms = within_memory(differentiate, lambda: run.objective.halve(forget, retain), method.max_length)
    if terms is not None:
        optimizer.step()
        run.trainable.constrain()
    return terms


def _diverged(run: Run, rung: int, learning_rate: float, state: TrainingState) -> None:
    """End a rung whose model no longer gives numbers; its best look so far stands."""
    state.finished = True
    run.observer.phase("unlearning", *_progress(run, rung, state.step))
    message = (
        f"At learning rate {learning_rate:g} the model gives no finite numbers from step {state.step} on."
    )
    run.observer.event("warning", {"code": "diverged", "message": message, "rung": rung, "step": state.step})


def _progress(run: Run, rung: int, step: int) -> tuple[int, int]:
    return rung * run.method.steps + step, run.runs * run.method.steps


def _report(run: Run, rung: int, learning_rate: float, step: int, terms: Terms) -> None:
    method = run.method
    run.observer.phase("unlearning", *_progress(run, rung, step))
    run.observer.event(
        "step",
        {
            "rung": rung,
            "learning_rate": learning_rate,
            "step": step,
            "loss": float(terms.total(method).detach()),
            "forget_loss": float(terms.forget.detach()),
            "retain_loss": float(terms.retain.detach()),
            "retain_weight": method.retain_weight if terms.retain_weight is None else terms.retain_weight,
            "anchor": float(terms.anchor.detach()),
        },
    )


def _look(run: Run, rung: int, learning_rate: float, state: TrainingState) -> None:
    quality = run.evaluate()
    if not quality.finite:
        _diverged(run, rung, learning_rate, state)
        return
    look = Look(state.step, quality, quality.retain_drop(run.base))
    state.looks.append(look.as_dict())
    looks = tuple(Look.from_dict(fields) for fields in state.looks)
    is_best = _best(looks, run.method) == look
    if is_best:
        state.best_values = snapshot(run.trainable)
    collapsed = _collapsed(look, run.method)
    searching = run.method.strength == "auto"
    ended = searching and (collapsed or _gone(looks, run))
    state.finished = ended or state.step >= run.method.steps
    shown: dict[str, Any] = {"rung": rung, "best": is_best, "collapsed": collapsed, **look.as_dict()}
    run.observer.event("look", shown)


def _gone(looks: tuple[Look, ...], run: Run) -> bool:
    """Whether nothing is left to forget, in two looks running: the first noisy look that says so is a lucky one."""
    bound = run.method.max_retain_drop
    return all(look.within(bound) and look.quality.fell_to(GONE, run.base) for look in looks[-2:])


def _collapsed(look: Look, method: Method) -> bool:
    """Guard: the retain quality is far past the bound and will not come back."""
    return look.retain_drop > max(COLLAPSE_FACTOR * method.max_retain_drop, COLLAPSE_DROP)
