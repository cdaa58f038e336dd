"""What is done to a service. Each fault picks its moment and its victim by the run's random numbers, and notes what
it hit. A fault that finds no victim in time notes nothing, and another one is drawn.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from benchmarks.chaos import moments
from benchmarks.chaos.keeper import Program, descendants
from benchmarks.chaos.moments import PATIENCE_SECONDS
from benchmarks.chaos.orders import PHASES, Order
from benchmarks.chaos.scene import Scene

Fault = Callable[[Scene], None]

# How far into a phase a kill may come: about as long as the phase takes on a busy machine.
SPREAD: Final = {
    "claimed": 0.1,
    "validating": 0.5,
    "attributing": 0.3,
    "unlearning": 3.0,
    "evaluating": 0.1,
    "publishing": 0.05,
}


def _job(scene: Scene) -> Order | None:
    """A job that a worker holds, in a random moment of a random phase."""
    phase = scene.rng.choice(PHASES[1:])
    delay = scene.rng.uniform(0, SPREAD[phase])
    scene.until(lambda: bool(scene.held(phase)) or not scene.ledger.open, PATIENCE_SECONDS)
    order = next(iter(scene.held(phase)), None)
    if order is None:
        return None
    scene.nap(delay)
    return order if order in scene.held() else None


def kill_engine(scene: Scene) -> None:
    """The engine of a job, as the kernel or an operator would."""
    order = _job(scene)
    if order is None or order.state is None or order.state.supervisor is None:
        return
    engines = descendants(order.state.supervisor)
    for pid in engines:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if engines:
        scene.note("kill engine", order.phase or "ended", "engine", order)


def kill_worker(scene: Scene) -> None:
    """A worker with a job: its first process, or the one that supervises the engine, or all at once."""
    order = _job(scene)
    if order is None or order.state is None:
        return
    state, worker = order.state, scene.service.worker_of(order.state)
    if worker is None or state.supervisor is None:
        return
    how = scene.rng.choice(("first process", "supervisor", "all"))
    phase = order.phase or "ended"
    if how == "supervisor" and state.supervisor != worker.pid:
        os.kill(state.supervisor, signal.SIGKILL)
    else:
        scene.service.keeper.kill(worker, family=how == "all")
    scene.note(f"kill worker ({how})", phase, "worker", order)


def kill_api(scene: Scene) -> None:
    """The API, while it does nothing, takes a job, or takes a file."""
    doing = scene.rng.choice((moments.idle, moments.submitting, moments.uploading))
    program = scene.service.keeper.programs["api"]
    if scene.until(scene.service.answers, PATIENCE_SECONDS):
        doing(scene, program)


def kill_dispatcher(scene: Scene) -> None:
    """The dispatcher, at any time, or exactly between commit and publish, or between publish and its mark."""
    how = scene.rng.choice((_any_time, moments.before_publish, moments.before_mark))
    how(scene, scene.service.keeper.programs["dispatcher"])


def _any_time(scene: Scene, dispatcher: Program) -> None:
    scene.pause(scene.rng.uniform(0, 1))
    if scene.service.keeper.kill(dispatcher):
        scene.note("kill dispatcher", "any time", "dispatcher")


def kill_unpublished(scene: Scene) -> None:
    """The engine, between the move of its result into the storage and the row that names it."""
    moments.unpublished(scene)


# Weight of each kill among all of a run, by lane. In the database lane the workers dispatch.
KILLS: Final[dict[str, dict[Fault, float]]] = {
    "celery": {
        kill_engine: 0.42,
        kill_worker: 0.25,
        kill_api: 0.12,
        kill_dispatcher: 0.15,
        kill_unpublished: 0.06,
    },
    "database": {kill_engine: 0.46, kill_worker: 0.36, kill_api: 0.12, kill_unpublished: 0.06},
}
