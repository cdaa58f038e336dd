"""A job's training as seuf_core does it, one step at a time: built as seuf_core.search builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seuf_core.method import Method
from seuf_core.moe.constants import FrozenRouter, TrainedRouter, keep_all
from seuf_core.moe.forward import Forward
from seuf_core.moe.grouped import use_grouped
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.view import MoEView
from seuf_core.observer import Silent
from seuf_core.unlearning import loop
from seuf_core.unlearning.objectives import Terms, build_objective
from seuf_core.unlearning.rule import Quality
from seuf_core.unlearning.scopes import build_trainable, snapshot
from seuf_core.unlearning.terms import TrainingData

_UNKNOWN = Quality(0.0, 0.0, 0.0, 0.0, 0.0)  # nothing is looked at here


class Ours:
    """One run of fixed strength, its constants computed.

    Args:
        targets: decoder layer -> target experts.
    """

    def __init__(
        self, view: MoEView, method: Method, data: TrainingData, targets: dict[int, tuple[int, ...]]
    ) -> None:
        self._model = view.model
        use_grouped(view.model)
        self._run = _run(view, method, data, targets)
        self.leaves = self._run.trainable.named_parameters()
        (rate,) = method.rates(1.0)
        self._optimizer = loop.optimizer_of(self._run, rate)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block the model computes with the trained parameters, its experts as a job has them."""
        use_grouped(self._model)
        with self._run.trainable.attached():
            yield

    def step(self, number: int) -> Terms:
        """Optimiser step `number` of the job, inside `attached`."""
        terms = loop.take_step(self._run, self._optimizer, number)
        assert terms is not None  # the loss is a number
        return terms


def _forward(
    view: MoEView, method: Method, data: TrainingData, targets: dict[int, tuple[int, ...]]
) -> Forward:
    begin = (TrainedRouter if method.trains_router else FrozenRouter)(view, targets, Shelf())
    keep_all(view, [(begin, [*data.forget, *data.retain])])
    return Forward(view, begin)


def _run(view: MoEView, method: Method, data: TrainingData, targets: dict[int, tuple[int, ...]]) -> loop.Run:
    """All wiring of seuf_core that the benchmarks know (as seuf_core.search._attempt)."""
    trainable = build_trainable(view, method, targets, on_disk=None, retain=data.retain, observer=Silent())
    return loop.Run(
        method=method,
        trainable=trainable,
        initial=snapshot(trainable),
        objective=build_objective(_forward(view, method, data, targets), method, data, targets),
        evaluate=lambda: _UNKNOWN,
        base=_UNKNOWN,
        sizes=(len(data.forget), len(data.retain)),
        work=Path(),
        fingerprint="",
        runs=1,
        observer=Silent(),
    )
