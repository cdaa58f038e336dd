"""Runs one job: claims it, starts its engine, keeps the lease alive, stops the engine, writes the job's end.

The supervisor imports no torch. Whatever happens to the engine, somebody is left to write what became of the
job; whatever happens to the supervisor, the engine dies with it and the lease expires.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy.exc import OperationalError

from store import leases
from store.database import Database
from store.errors import LeaseLost
from store.fenced import FencedJob
from store.leases import Claim
from store.settings import Settings
from worker.progress import MORE_MEMORY, insist

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
"""How often the supervisor looks whether the engine has ended or it should stop: the delay a person would
notice.
"""
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
    """The running process, and what was done to it."""

    process: subprocess.Popen[bytes]
    alive_at: float = field(default_factory=time.monotonic)
    beat_at: float = field(default_factory=time.monotonic)
    asked_at: float | None = None
    lease_lost: bool = False
    cancel: bool = False


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
        log.info("%s taken with lease %d", claim.job_id, claim.token)
        engine = _Engine(self._assign(claim))
        try:
            self._watch(engine, claim, stop)
        finally:
            _clear(engine.process)
        if not engine.lease_lost:
            insist(lambda: self._write_end(engine, claim))
        return True

    def _assign(self, claim: Claim) -> subprocess.Popen[bytes]:
        """An engine that has been told of its job: the one that is ready, or a new one if that has fallen."""
        if self._ready is not None and _has_ended(self._ready):
            self.close()
        process, self._ready = self._ready or self._start(), None
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended: seen as a crash, like any moment later
            process.stdin.write(f"{claim.job_id} {claim.token}\n".encode())
            process.stdin.flush()
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        """An engine in a session of its own, holding one end of a pipe that closes when we die."""
        inherited = {name: value for name, value in os.environ.items() if name != "SEUF_SECRET"}
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
            if engine.lease_lost:
                self._kill(engine)
            elif engine.asked_at is None:
                if engine.cancel or stop():
                    engine.asked_at = now
                    log.info("%s: asking its engine to stop", claim.job_id)
                    # Not Popen.terminate: it reaps an engine that has just ended, and its id would be free.
                    os.kill(engine.process.pid, signal.SIGTERM)
            elif now - engine.asked_at > self.settings.cancel_grace_seconds:
                self._kill(engine)
            time.sleep(TICK_SECONDS)

    def _beat(self, engine: _Engine, claim: Claim) -> None:
        """Extend the lease and hear of a cancel.

        A database that is away for less than a lease is waited for.
        """
        try:
            with self.database.write() as session:
                heard = leases.heartbeat(session, claim, self.settings.lease_seconds)
        except OperationalError as error:
            silent = time.monotonic() - engine.alive_at
            log.warning("%s: no heartbeat for %.0f s (%s)", claim.job_id, silent, type(error).__name__)
            engine.lease_lost = silent > self.settings.lease_seconds
            return
        engine.alive_at = time.monotonic()
        engine.cancel = engine.cancel or heard.cancel_requested
        # A job that has just ended has no lease either; its engine may leave by itself.
        engine.lease_lost = not heard.alive and not _has_ended(engine.process, within=LEAVE_SECONDS)

    def _kill(self, engine: _Engine) -> None:
        os.killpg(engine.process.pid, signal.SIGKILL)

    def _write_end(self, engine: _Engine, claim: Claim) -> None:
        """The job's end, unless the engine has written it."""
        job = FencedJob(self.database, claim.job_id, claim.token)
        code = engine.process.returncode
        try:
            if self._cancel_requested(claim):
                job.cancelled()
            elif engine.asked_at is not None:
                job.hand_back()
            else:
                job.fail(*_verdict(code))
        except LeaseLost:
            log.info("%s has ended (engine exit %d)", claim.job_id, code)
        else:
            log.warning("%s: engine left no result (exit %d); its end was written for it", claim.job_id, code)

    def _cancel_requested(self, claim: Claim) -> bool:
        with self.database.write() as session:
            return leases.heartbeat(session, claim, self.settings.lease_seconds).cancel_requested


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


def _verdict(exit_code: int) -> tuple[str, str, str]:
    """Code, message and fix for an engine that ended without writing an end and that we did not stop."""
    if exit_code == -signal.SIGKILL:
        return (
            "OUT_OF_MEMORY",
            "The engine was killed from outside (SIGKILL), as the system does when memory runs out.",
            MORE_MEMORY,
        )
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return (
        "ENGINE_CRASHED",
        f"The engine ended without a result ({how}).",
        "Look at the worker's log of that time, and report it with the job's id if it happens again.",
    )
