"""Periodic work that no single job owns, done by one process for all of them.

To add some: a function of database and settings, and a Duty in DUTIES. The row of table `duties` keeps
several processes from doing the same work at once. That is thrift, not a lock: a process that was stopped
past its hold and goes on will act beside the next one. So `act` must be right when two run at once, and when
it is cut off anywhere.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from store import duties, idempotency, leases
from store.database import Database
from store.ids import random_base32
from store.settings import Settings
from worker.audit import sign_heads
from worker.life import worker_id
from worker.sweeps import report_missing, sweep_checkpoints, sweep_files
from worker.uploads import expire_uploads
from worker.webhooks import deliver, forget_old

log = logging.getLogger(__name__)

HOLD_SECONDS = 15
"""A holder that is silent for so long is replaced."""
KEEP_SECONDS = 5
"""Between two signs of life of a holder whose work takes long."""


@dataclass(frozen=True)
class Duty:
    """`act` is done every so many seconds, counted from its start, by whichever process is first.

    It runs in a thread of its own, so it may take long. What it raises is logged, and it is tried again when
    it is next due.
    """

    name: str
    every_seconds: float
    act: Callable[[Database, Settings], None]


def release_expired(database: Database, settings: Settings) -> None:
    """Jobs of silent workers go back to the queue, or end."""
    with database.write() as session:
        released = [(job.id, job.status) for job in leases.release_expired(session, settings.max_attempts)]
    for job_id, status in released:
        log.warning("%s: its lease expired; now %s", job_id, status)


def forget_answers(database: Database, settings: Settings) -> None:
    """Answers under an Idempotency-Key are kept for a while only."""
    with database.write() as session:
        idempotency.expire(session, timedelta(hours=settings.idempotency_hours))


DUTIES: tuple[Duty, ...] = (
    Duty("release_expired", 2, release_expired),
    Duty("sweep_checkpoints", 3600, sweep_checkpoints),
    Duty("sweep_files", 3600, sweep_files),
    Duty("report_missing", 86_400, report_missing),
    Duty("sign_audit", 10, sign_heads),
    Duty("expire_uploads", 300, expire_uploads),
    Duty("forget_answers", 3600, forget_answers),
    Duty("send_webhooks", 1, deliver),
    Duty("forget_webhooks", 3600, forget_old),
)


@dataclass
class _Turn:
    """Where this process stands with one duty."""

    duty: Duty
    due_at: float = field(default_factory=time.monotonic)
    kept_at: float = 0
    thread: threading.Thread | None = None


class Rota:
    """The duties as one process does them. `look` is called again and again, from one thread."""

    def __init__(self, database: Database, settings: Settings, duties: Sequence[Duty] = DUTIES) -> None:
        self.database = database
        self.settings = settings
        self.holder = f"{worker_id()}:{random_base32(8)}"
        self._turns = [_Turn(duty) for duty in duties]

    def look(self) -> None:
        """Start what is due and ours, keep what runs, and give back what is done. Raises nothing."""
        for turn in self._turns:
            try:
                self._look_at(turn)
            except SQLAlchemyError as error:
                log.warning("duty %s: database away (%s)", turn.duty.name, type(error).__name__)

    def close(self, seconds: float) -> None:
        """Give what runs so many seconds, all together, to end by itself."""
        end = time.monotonic() + seconds
        for turn in self._turns:
            if turn.thread is not None:
                turn.thread.join(max(0, end - time.monotonic()))

    def _look_at(self, turn: _Turn) -> None:
        now = time.monotonic()
        if turn.thread is not None:
            if not turn.thread.is_alive():
                turn.thread = None
                # Whoever is next does it when it is next due, not the moment it is free.
                self._keep(turn, max(0, turn.due_at - now))
            elif now - turn.kept_at >= KEEP_SECONDS:
                self._keep(turn, HOLD_SECONDS)
        elif now >= turn.due_at:
            turn.due_at = now + turn.duty.every_seconds
            with self.database.write() as session:
                ours = duties.take(session, turn.duty.name, self.holder, HOLD_SECONDS)
            if ours:
                turn.kept_at = now
                turn.thread = threading.Thread(
                    target=self._act, args=(turn.duty,), name=turn.duty.name, daemon=True
                )
                turn.thread.start()

    def _keep(self, turn: _Turn, seconds: float) -> None:
        turn.kept_at = time.monotonic()
        with self.database.write() as session:
            duties.keep(session, turn.duty.name, self.holder, seconds)

    def _act(self, duty: Duty) -> None:
        try:
            duty.act(self.database, self.settings)
        except (OperationalError, ConnectionError) as error:
            log.warning("duty %s: %s; again in %.0f s", duty.name, type(error).__name__, duty.every_seconds)
        except Exception:
            log.exception("duty %s failed; again in %.0f s", duty.name, duty.every_seconds)
