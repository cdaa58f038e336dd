"""Faults that kill nothing of ours: a worker stopped and continued, and what the service stands on going away."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import redis

from benchmarks.chaos import moments, parts
from benchmarks.chaos.scene import Scene

Trouble = Callable[[Scene], None]
FULL_SECONDS: Final = 4.0
DOWN_SECONDS: Final = 6.0


def stop_and_continue(scene: Scene) -> None:
    """A worker with all its processes stands still past its lease, until its job is no longer its own."""
    if not scene.until(lambda: bool(scene.held()), 20):
        return
    scene.nap(scene.rng.uniform(0, 2))
    order = next(iter(scene.held()), None)
    if order is None or order.state is None or (worker := scene.service.worker_of(order.state)) is None:
        return
    token, phase, family = order.state.token, order.phase or "ended", worker.family()
    _signal(family, signal.SIGSTOP)
    lost = scene.until(lambda: order.ended or (order.state is not None and order.state.token != token), 30)
    # Now and then the job is even finished by somebody else before the stopped worker goes on.
    if scene.rng.random() < 0.5:
        scene.until(lambda: order.ended, 15)
    _signal(family, signal.SIGCONT)
    scene.note("worker stopped and continued", phase if lost else "kept its lease", order=order)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def flush_redis(scene: Scene) -> None:
    """Every message is lost."""
    with suppress(redis.RedisError):
        redis.Redis(port=scene.service.ports["redis"]).flushall()
        scene.note("redis flushed", "")


def restart_redis(scene: Scene) -> None:
    """Redis is killed; it starts again with nothing."""
    if scene.service.keeper.kill(scene.service.keeper.programs["redis"]):
        scene.note("redis killed and restarted", "")
        scene.until(lambda: parts.redis_answers(scene.service.ports["redis"]), parts.START_SECONDS)


def restart_postgres(scene: Scene) -> None:
    """Postgres is stopped in good order: every connection breaks, and no new one is taken for a while."""
    program = scene.service.keeper.programs["postgres"]
    if program.pid is not None:
        program.killed = True
        os.kill(program.pid, program.stop_signal)
        scene.note("postgres restarted", "")
        _back(scene)


def crash_postgres(scene: Scene) -> None:
    """All of Postgres is killed; it starts again from its log."""
    if scene.service.keeper.kill(scene.service.keeper.programs["postgres"], family=True):
        scene.note("postgres killed and restarted", "")
        _back(scene)


def _back(scene: Scene) -> None:
    down = scene.service.keeper.programs["postgres"]
    scene.until(lambda: down.pid is None, 10)
    scene.until(lambda: parts.postgres_answers(scene.service.ports["postgres"]), parts.START_SECONDS)


def fill_disk(scene: Scene) -> None:
    """Nothing more can be written for some seconds."""
    if not scene.service.has_own_disk:
        return
    scene.until(lambda: bool(scene.held()), 20)
    with parts.filled(scene.service.disk):
        scene.pause(FULL_SECONDS)
    scene.note("disk full", f"for {FULL_SECONDS:.0f} s")


def receiver_down(scene: Scene) -> None:
    """Nobody takes webhooks for some seconds; then somebody does again."""
    program = scene.service.keeper.programs["receiver"]
    scene.service.keeper.stop(program)
    scene.pause(DOWN_SECONDS)
    program.start()
    scene.note("webhook receiver down", f"for {DOWN_SECONDS:.0f} s")


TROUBLES: Final[dict[str, tuple[Trouble, ...]]] = {
    "celery": (
        stop_and_continue,
        flush_redis,
        restart_redis,
        restart_postgres,
        crash_postgres,
        fill_disk,
        receiver_down,
        moments.truncated_upload,
    ),
    "database": (stop_and_continue, fill_disk, receiver_down, moments.truncated_upload),
}
