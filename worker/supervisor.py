"""Runs one job: claims it, starts its engine, keeps the lease alive, stops the engine, writes the job's end.

The supervisor imports no torch. Whatever happens to the engine, somebody is left to write what became of the
job; whatever happens to the supervisor, the engine dies with it and the lease expires.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from store import leases
from store.database import AWAY, Database
from store.errors import LeaseLost
from store.fenced import FencedJob
from store.leases import Claim, Limits, Loss
from store.settings import Settings
from worker import telling
from worker.folders import trim
from worker.memory import held_bytes
from worker.progress import insist
from worker.telling import Assignment
from worker.verdict import MORE_MEMORY, KernelKills, verdict

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
"""How often the supervisor looks whether the engine has ended or it should stop: the delay a person would
notice.
"""
WEIGH_SECONDS = 1
"""How often the memory of an engine with a limit is added up: about a millisecond."""
LEAVE_SECONDS = 2
"""What an engine that has just written its job's end, and so has no lease, is given to leave by itself."""

ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
"""Models come from disk only; no progress bars in a log."""
ENGINE_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Unless the operator says otherwise: a waiting thread sleeps. One that spins makes an engine crawl on a machine
that has other work.
"""

Stop = Callable[[], bool]


@dataclass
class _Engine:
    """The running process, what it may use, and what was done to it. Times are of time.monotonic."""

    process: subprocess.Popen[bytes]
    limits: Limits
    kills: KernelKills | None
    alive_at: float = field(default_factory=time.monotonic)
    beat_at: float = field(default_factory=time.monotonic)
    weighed_at: float = field(default_factory=time.monotonic)
    ends_at: float = math.inf
    asked_at: float | None = None
    lease_lost: bool = False
    cancel: bool = False
    over: Loss | None = None

    def __post_init__(self) -> None:
        if self.limits.seconds_left is not None:
            self.ends_at = self.alive_at + self.limits.seconds_left


class Supervisor:
    """One per worker process; runs one job at a time, from the thread that calls it.

    (The engine asks the kernel to kill it when that thread ends, so the thread must outlive the job.)
    """

    def __init__(self, database: Database, settings: Settings, worker_id: str) -> None:
        self.database = database
        self.settings = settings
        self.worker_id = worker_id
        self._ready: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Have an engine ready for the next job, if the settings ask for it.

        One that has fallen is not replaced before there is a job: it would fall again and again.
        """
        if self.settings.warm_engine and self._ready is None:
            self._ready = self._start()

    def close(self) -> None:
        """End the engine that is ready for a next job."""
        if self._ready is not None:
            _clear(self._ready)
            self._ready = None

    def run(self, job_id: str | None, stop: Stop) -> bool:
        """Run the queued job `job_id` (None: the oldest) to its end. False: it was not there to be taken.

        `stop` is asked all the time; once true, the engine writes a training checkpoint and the job goes
        back to the queue for another worker.
        """
        with self.database.write() as session:
            claim = leases.claim(session, job_id, self.worker_id, self.settings.lease_seconds)
            if claim is None:
                return False
            limits = leases.limits(session, claim)
            assignment = telling.assignment(session, claim)
        with telling.attempt(assignment) as given:
            self._run(claim, given, limits, stop)
        return True

    def _run(self, claim: Claim, given: Assignment, limits: Limits, stop: Stop) -> None:
        log.info("%s taken with lease %d", claim.job_id, claim.token)
        process = self._assign(given)
        engine = _Engine(process, limits, KernelKills.near(process.pid))
        try:
            self._watch(engine, claim, stop)
        finally:
            _clear(process)
        if not engine.lease_lost:
            with suppress(OSError):  # a sweep will do it
                trim(self.settings.work_dir, claim.job_id, claim.token)
            insist(lambda: self._write_end(engine, claim))

    def _assign(self, given: Assignment) -> subprocess.Popen[bytes]:
        """An engine that has been told of its job: the one that is ready, or a new one if that has fallen."""
        if self._ready is not None and _has_ended(self._ready):
            self.close()
        process, self._ready = self._ready or self._start(), None
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended: seen as a crash, like any moment later
            process.stdin.write(given.line())
            process.stdin.flush()
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        """An engine in a session of its own, holding one end of a pipe that closes when we die."""
        inherited = Settings.without_secrets(os.environ)
        return subprocess.Popen(
            [sys.executable, "-m", "worker.engine"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**ENGINE_DEFAULTS, **inherited, **self.settings.environment(), **ENGINE_ENVIRONMENT},
        )

    def _watch(self, engine: _Engine, claim: Claim, stop: Stop) -> None:
        """Until the engine has ended, by itself or by us."""
        while not _has_ended(engine.process):
            now = time.monotonic()
            if now - engine.beat_at >= self.settings.heartbeat_seconds:
                engine.beat_at = now
                self._beat(engine, claim)
            if engine.over is None:
                engine.over = _over_limit(engine, now)
            if engine.lease_lost or (engine.over is not None and engine.over.code == "MEMORY_LIMIT"):
                # At once: another worker may have the job, or the machine may soon have no memory left.
                _kill(engine)
            elif engine.asked_at is None:
                if engine.cancel or engine.over is not None or stop():
                    engine.asked_at = now
                    log.info("%s: asking its engine to stop", claim.job_id)
                    # Not Popen.terminate: it reaps an engine that has just ended, and its id would be free.
                    os.kill(engine.process.pid, signal.SIGTERM)
            elif now - engine.asked_at > self.settings.cancel_grace_seconds:
                _kill(engine)
            time.sleep(TICK_SECONDS)

    def _beat(self, engine: _Engine, claim: Claim) -> None:
        """Extend the lease and hear of a cancel.

        A database that is away for less than a lease is waited for.
        """
        try:
            with self.database.write() as session:
                heard = leases.heartbeat(session, claim, self.settings.lease_seconds)
        except AWAY as error:
            silent = time.monotonic() - engine.alive_at
            log.warning("%s: no heartbeat for %.0f s (%s)", claim.job_id, silent, type(error).__name__)
            engine.lease_lost = silent > self.settings.lease_seconds
            return
        engine.alive_at = time.monotonic()
        engine.cancel = engine.cancel or heard.cancel_requested
        # A job that has just ended has no lease either; its engine may leave by itself.
        leaves = heard.ended and _has_ended(engine.process, within=LEAVE_SECONDS)
        engine.lease_lost = not heard.alive and not leaves

    def _write_end(self, engine: _Engine, claim: Claim) -> None:
        """The job's end, or that it waits for another attempt, unless the engine has written its end."""
        job, attempts = FencedJob(self.database, claim.job_id, claim.token), self.settings.max_attempts
        code = engine.process.returncode
        try:
            if engine.over is not None:
                job.lost(engine.over, attempts)
            elif engine.asked_at is not None:
                job.hand_back()
            else:
                job.lost(verdict(code, engine.kills), attempts)
        except LeaseLost:
            log.info("%s has ended (engine exit %d)", claim.job_id, code)
        else:
            log.warning("%s: its engine left no result (exit %d)", claim.job_id, code)


def _over_limit(engine: _Engine, now: float) -> Loss | None:
    """The limit that the job is over now, if it is over one."""
    limits = engine.limits
    if now > engine.ends_at:
        what = f"The job ran longer than its limit, limits.max_seconds {limits.max_seconds:g}."
        fix = (
            "Retry it: it goes on from its last training checkpoint, for as long again. Or submit it with fewer steps, "
            "smaller sets or a larger limit."
        )
        return Loss("TIME_LIMIT", what, fix, again=False)
    if limits.max_memory_bytes is None or now - engine.weighed_at < WEIGH_SECONDS:
        return None
    engine.weighed_at = now
    held = held_bytes(engine.process.pid)
    if held <= limits.max_memory_bytes:
        return None
    what = f"The engine held {held} bytes, and limits.max_memory_bytes is {limits.max_memory_bytes}."
    return Loss("MEMORY_LIMIT", what, f"Submit it with a larger limit. {MORE_MEMORY}", again=False)


def _kill(engine: _Engine) -> None:
    os.killpg(engine.process.pid, signal.SIGKILL)


def _clear(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the engine's process group, then reap the engine itself, in that order: its
    id, and so the group's, is not free for others before.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()


def _has_ended(process: subprocess.Popen[bytes], within: float = 0) -> bool:
    """Has the process ended? It is not reaped, so that its id and process group stay ours until _clear."""
    end = time.monotonic() + within
    while True:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None or time.monotonic() >= end:
            return found is not None
        time.sleep(0.02)
