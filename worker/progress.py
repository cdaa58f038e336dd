"""The observer of a job: what the method tells becomes rows, as often as a person needs and no oftener."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from seuf_core.errors import Cancelled
from store.database import AWAY
from store.errors import StorageAway
from store.fenced import AttributionResult, FencedJob, Selected

T = TypeVar("T")

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.5
"""Between two phase rows, and between two step rows: four rows a second together."""
INTERRUPTIBLE = frozenset({"validating", "attributing", "evaluating"})
"""Phases that may end between any two units of work: nothing in them is worth saving. Training stops itself,
after a training checkpoint; a checkpoint that is being written is finished.
"""
RETRY_SECONDS = (0.5, 1, 2, 4, 8, 15)
"""Pauses between attempts at a write that must not be lost: half a minute, a restart of the database."""


def insist(act: Callable[[], T]) -> T:
    """Do `act`, again if the database or the storage is away for a moment; its result."""
    for pause in RETRY_SECONDS:
        try:
            return act()
        except (*AWAY, StorageAway) as error:
            log.warning("database or storage away (%s); again in %.1f s", type(error).__name__, pause)
            time.sleep(pause)
    return act()


class JobObserver:
    """Writes through the fence. LeaseLost comes out of every method and ends the run.

    Nothing is saved between two calls of `cancelled`, which training asks right before it saves: so a run that was
    stopped past its lease and goes on finds out before it writes a file.
    """

    def __init__(self, job: FencedJob, stop: Callable[[], bool]) -> None:
        self._job = job
        self._stop = stop
        self._phase: str | None = None
        self._phase_at = self._step_at = -INTERVAL_SECONDS
        self._held_at = -INTERVAL_SECONDS
        self._training_since: tuple[float, int] | None = None
        self._seconds_left: float | None = None

    def phase(self, name: str, done: int, total: int) -> None:
        """Written when the phase changes or is complete, else at most every INTERVAL_SECONDS."""
        if name in INTERRUPTIBLE and self._stop():
            raise Cancelled
        now = time.monotonic()
        self._estimate(name, done, total, now)
        if name == self._phase and done < total and now - self._phase_at < INTERVAL_SECONDS:
            return
        self._phase, self._phase_at = name, now
        self._unless_away(lambda: self._job.phase(name, done, total))

    def event(self, type: str, data: Mapping[str, Any]) -> None:  # noqa: A002  (the protocol's name)
        """Steps at most every INTERVAL_SECONDS; everything else always, results also in their tables."""
        if type == "step":
            self._step(data)
        elif type == "attribution":
            insist(lambda: self._job.attribution(attribution_of(data)))
            shown = {key: value for key, value in data.items() if key not in ("matrix", "selection")}
            insist(lambda: self._job.event(type, shown))
        elif type == "selection":
            insist(lambda: self._job.selection(selected(data["experts"])))
            insist(lambda: self._job.event(type, data))
        else:
            insist(lambda: self._job.event(type, data))

    def cancelled(self) -> bool:
        """Has the supervisor asked the engine to stop?"""
        if time.monotonic() - self._held_at >= INTERVAL_SECONDS:
            self._unless_away(self._job.check)
        return self._stop()

    def _step(self, data: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._step_at < INTERVAL_SECONDS:
            return
        self._step_at = now
        self._unless_away(lambda: self._job.step(data["step"], data["loss"], self._seconds_left, data))

    def _estimate(self, name: str, done: int, total: int, now: float) -> None:
        """Seconds of training left if it goes on as it went since its first sign of life in this process."""
        if name != "unlearning":
            self._training_since = self._seconds_left = None
        elif self._training_since is None:
            self._training_since = (now, done)
        elif done > self._training_since[1]:
            since, first = self._training_since
            self._seconds_left = round((now - since) / (done - first) * (total - done), 1)

    def _unless_away(self, write: Callable[[], None]) -> None:
        """Progress is told again soon: training does not wait for a database that is away."""
        try:
            write()
            self._held_at = time.monotonic()
        except AWAY as error:
            log.warning("progress not written (%s)", type(error).__name__)


def attribution_of(data: Mapping[str, Any]) -> AttributionResult:
    """The method's attribution (seuf_core.UnlearnResult) as the store keeps it."""
    return AttributionResult(
        data["score"], data["matrix"], data["layers"], data["stability"], data["coverage"]
    )


def selected(experts: list[dict[str, Any]]) -> list[Selected]:
    """The method's selection as the store keeps it."""
    return [Selected(one["layer"], one["expert"], one["score"]) for one in experts]
