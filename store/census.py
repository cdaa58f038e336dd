"""The service in numbers, over all tenants, for whoever watches it.

What is so now is counted anew. What has ended is added up once: each process keeps the sums up to some minutes ago and
reads only what ended since, so a look stays cheap however many jobs there were, and every process says the same.
"""

from bisect import bisect_left
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.database import Database, utc_now
from store.tables import (
    AuditChain,
    AuditHead,
    AuditRow,
    Checkpoint,
    Duty,
    File,
    Job,
    OutboxMessage,
    Upload,
    UploadPart,
    WebhookDelivery,
)
from store.transitions import FINAL, HELD, Status
from store.webhooks import FAILED, PENDING

BOUNDS: Final = (0.5, 1, 2.5, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400)
"""Upper bounds of the buckets of durations, in seconds: the start of an engine to a day."""
SETTLED: Final = timedelta(minutes=10)
"""A job that ended longer ago than this has been committed: a transaction takes seconds."""
SILENT_SECONDS: Final = 30.0
"""A dispatcher takes its first duty every two seconds, and another one takes over after fifteen: silent for longer,
there is none.
"""
ACTIVE: Final = tuple(status for status in Status if status not in FINAL)


@dataclass(frozen=True)
class Census:
    """What is so now. Ages in seconds, 0 when there is nothing that could be old.

    Attributes:
        jobs: how many are in each state that is not final.
        oldest_queued: age of the job that has waited longest.
        busy_workers: how many workers hold a job.
        lost_leases: how often a worker of a job that has not ended fell silent.
        outbox: messages that the broker has yet to be told.
        stored_bytes: by kind: files, uploads, checkpoints.
        deliveries: webhook deliveries that are pending, and that were given up.
        oldest_due: how long the delivery that should have been made first is overdue.
        oldest_unsigned: age of the oldest audit row that no signed head covers.
        dispatcher_silent: since a dispatcher last had its duties; None: never.
    """

    jobs: dict[str, int]
    oldest_queued: float
    busy_workers: int
    lost_leases: int
    outbox: int
    stored_bytes: dict[str, int]
    deliveries: dict[str, int]
    oldest_due: float
    oldest_unsigned: float
    dispatcher_silent: float | None


def take(session: Session) -> Census:
    """Count. Every query is answered from an index or a short table, but for the bytes of files and checkpoints."""
    at = utc_now(session)
    counted = select(Job.status, func.count()).where(Job.status.in_(ACTIVE)).group_by(Job.status)
    jobs = {status.value: number for status, number in session.execute(counted)}
    workers = select(func.count(Job.lease_worker.distinct())).where(Job.status.in_(HELD))
    lost = select(func.sum(Job.lost_leases)).where(Job.status.in_(ACTIVE))
    waiting = select(func.count()).select_from(OutboxMessage).where(OutboxMessage.published_at.is_(None))
    return Census(
        jobs={status.value: jobs.get(status.value, 0) for status in ACTIVE},
        oldest_queued=oldest_queued(session, at),
        lost_leases=int(session.execute(lost).scalar_one() or 0),
        busy_workers=session.execute(workers).scalar_one(),
        outbox=session.execute(waiting).scalar_one(),
        stored_bytes=_stored(session),
        deliveries=_deliveries(session),
        oldest_due=_oldest_due(session, at),
        oldest_unsigned=_oldest_unsigned(session, at),
        dispatcher_silent=dispatcher_silent(session, at),
    )


def oldest_queued(session: Session, at: datetime) -> float:
    """Age in seconds of the job that has waited longest; 0 when none waits."""
    return _age(at, session.scalar(select(func.min(Job.created_at)).where(Job.status == Status.QUEUED)))


def dispatcher_silent(session: Session, at: datetime) -> float | None:
    """Seconds since some dispatcher last held a duty (0: one does); None: there never was one."""
    held_until = session.scalar(select(func.max(Duty.expires_at)))
    return None if held_until is None else _age(at, held_until)


def _age(at: datetime, since: datetime | None) -> float:
    return 0.0 if since is None else max(0.0, (at - since).total_seconds())


def _stored(session: Session) -> dict[str, int]:
    files = select(func.sum(File.bytes)).where(File.deleted_at.is_(None))
    parts = select(func.sum(UploadPart.bytes)).join(Upload, Upload.id == UploadPart.upload_id)
    sums = {
        "files": files,
        "uploads": parts.where(Upload.file_id.is_(None)),
        "checkpoints": select(func.sum(Checkpoint.bytes)),
    }
    return {kind: int(session.execute(query).scalar_one() or 0) for kind, query in sums.items()}


def _deliveries(session: Session) -> dict[str, int]:
    """Those that are done are not counted: there may be millions, and nobody has to act on them."""
    query = (
        select(WebhookDelivery.status, func.count().label("number"))
        .where(WebhookDelivery.status.in_((FAILED, PENDING)))
        .group_by(WebhookDelivery.status)
    )
    return {PENDING: 0, FAILED: 0} | {row.status: row.number for row in session.execute(query)}


def _oldest_due(session: Session, at: datetime) -> float:
    due = select(func.min(WebhookDelivery.next_attempt_at)).where(WebhookDelivery.status == PENDING)
    return _age(at, session.scalar(due))


def _oldest_unsigned(session: Session, at: datetime) -> float:
    """Since the oldest audit row was written that is past the newest signed head of its tenant."""
    newest = (
        select(func.coalesce(func.max(AuditHead.seq), 0))
        .where(AuditHead.tenant == AuditChain.tenant)
        .correlate(AuditChain)
        .scalar_subquery()
    )
    next_row = (AuditRow.tenant == AuditChain.tenant) & (AuditRow.seq == newest + 1)
    return _age(
        at, session.scalar(select(func.min(AuditRow.at)).select_from(AuditChain).join(AuditRow, next_row))
    )


@dataclass
class Durations:
    """A histogram: `counts` of durations in each bucket of BOUNDS and above, and their `total` in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass
class Ended:
    """Sums over the jobs that have ended.

    Attributes:
        jobs: from the first claim to the end (0 for a job that was never claimed), by final state.
        phases: of those that succeeded (store.durations).
        attempts: how often they were started.
        lost_leases: how often a worker of theirs fell silent.
    """

    jobs: dict[str, Durations] = field(
        default_factory=lambda: {status.value: Durations() for status in FINAL}
    )
    phases: dict[str, Durations] = field(default_factory=dict)
    attempts: int = 0
    lost_leases: int = 0


class Watch:
    """Takes the census and adds up the jobs that have ended. For one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._settled = Ended()
        self._until = datetime.min.replace(tzinfo=UTC)

    def look(self) -> tuple[Census, Ended]:
        """Both as they are now. The first look goes through all jobs, later ones through those of the last minutes."""
        with self._database.read() as session:
            if not self._database.is_sqlite:
                # All queries see one state: a job that ends between two of them would be counted twice, and a sum
                # that falls again looks like a restart.
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            return take(session), self._ended(session)

    def _ended(self, session: Session) -> Ended:
        edge = utc_now(session) - SETTLED
        if edge > self._until:
            _add(session, self._settled, self._until, edge)
            self._until = edge
        now = deepcopy(self._settled)
        _add(session, now, self._until, None)
        return now


def _add(session: Session, sums: Ended, since: datetime, until: datetime | None) -> None:
    columns = (Job.status, Job.started_at, Job.finished_at, Job.phase_seconds, Job.attempts, Job.lost_leases)
    query = select(*columns).where(Job.finished_at >= since)
    if until is not None:
        query = query.where(Job.finished_at < until)
    for row in session.execute(query.execution_options(yield_per=1000)):
        sums.jobs[row.status.value].add(_seconds(row.started_at, row.finished_at))
        sums.attempts += row.attempts
        sums.lost_leases += row.lost_leases
        for phase, seconds in (row.phase_seconds or {}).items():
            sums.phases.setdefault(phase, Durations()).add(seconds)


def _seconds(started_at: datetime | None, finished_at: datetime) -> float:
    return 0.0 if started_at is None else max(0.0, (finished_at - started_at).total_seconds())


def cumulative(durations: Durations) -> Sequence[tuple[str, float]]:
    """(upper bound, how many up to it) as Prometheus wants buckets."""
    reached, rows = 0, []
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), durations.counts, strict=True):
        reached += count
        rows.append((bound, float(reached)))
    return rows
