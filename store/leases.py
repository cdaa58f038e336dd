"""Who holds a job: claim, heartbeat, expiry. For workers, across tenants.

A claim raises the job's lease token; every later write of the worker carries it (store.fenced), so a worker
that lost its lease can change nothing. Each function runs in the caller's transaction.
"""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ScalarSelect, func, select, update
from sqlalchemy.orm import Session

from store import events
from store.database import utc_now
from store.outbox import Outbox
from store.tables import Job
from store.transitions import HELD, Status

MAX_ATTEMPTS = 3
"""How often a job is started before its loss of workers is taken to be its own doing."""


@dataclass(frozen=True)
class Claim:
    """The right to run a job, until the lease expires or somebody else's token is higher."""

    job_id: str
    token: int


@dataclass(frozen=True)
class Heartbeat:
    """`alive`: the lease is still ours and was extended. `cancel_requested`: stop the engine."""

    alive: bool
    cancel_requested: bool


def claim(session: Session, job_id: str | None, worker_id: str, lease_seconds: float) -> Claim | None:
    """Take the queued job `job_id`, or with None the oldest queued one.

    None: somebody else has it, or none waits.
    """
    at = utc_now(session)
    query = (
        update(Job)
        .where(Job.id == (_next_queued() if job_id is None else job_id), Job.status == Status.QUEUED)
        .values(
            status=Status.RUNNING,
            lease_token=Job.lease_token + 1,
            lease_worker=worker_id,
            lease_expires_at=at + timedelta(seconds=lease_seconds),
            attempts=Job.attempts + 1,
            started_at=func.coalesce(Job.started_at, at),
        )
        .returning(Job.id, Job.lease_token, Job.attempts)
    )
    row = session.execute(query, execution_options={"synchronize_session": False}).one_or_none()
    if row is None:
        return None
    events.append(session, row.id, "status", {"status": Status.RUNNING, "attempt": row.attempts})
    Outbox(session).settle(row.id)
    return Claim(row.id, row.lease_token)


def _next_queued() -> ScalarSelect[str]:
    """The oldest queued job nobody is claiming right now.

    (SQLite knows no row locks; there BEGIN IMMEDIATE does it.)
    """
    query = select(Job.id).where(Job.status == Status.QUEUED).order_by(Job.created_at, Job.id).limit(1)
    return query.with_for_update(skip_locked=True).scalar_subquery()


def heartbeat(session: Session, held: Claim, lease_seconds: float) -> Heartbeat:
    """Extend the lease by `lease_seconds` from now."""
    query = (
        update(Job)
        .where(Job.id == held.job_id, Job.lease_token == held.token, Job.status.in_(HELD))
        .values(lease_expires_at=utc_now(session) + timedelta(seconds=lease_seconds))
        .returning(Job.cancel_requested)
    )
    row = session.execute(query, execution_options={"synchronize_session": False}).one_or_none()
    return Heartbeat(row is not None, row is not None and row.cancel_requested)


def release_expired(session: Session, max_attempts: int = MAX_ATTEMPTS) -> list[Job]:
    """End every lease that has run out; returns the jobs as they are now.

    Running jobs go back to the queue while attempts remain and fail with WORKER_LOST after that; cancelling
    jobs are cancelled: nobody is left to stop.
    """
    at = utc_now(session)
    expired = select(Job).where(Job.status.in_(HELD), Job.lease_expires_at < at).order_by(Job.id)
    jobs = list(session.scalars(expired.with_for_update(skip_locked=True)))
    for job in jobs:
        _release(session, job, max_attempts)
    return jobs


def _release(session: Session, job: Job, max_attempts: int) -> None:
    worker = job.lease_worker
    job.lease_token += 1  # fences the silent worker at once, not only when the next one claims
    job.lease_worker = job.lease_expires_at = None
    data: dict[str, str] = {}
    if job.status is Status.CANCELLING:
        job.status = Status.CANCELLED
    elif job.attempts < max_attempts:
        job.status = Status.QUEUED
        data = {"reason": f"worker {worker} fell silent; attempt {job.attempts} of {max_attempts} ended"}
    else:
        job.status = Status.FAILED
        job.error_code = "WORKER_LOST"
        job.error_message = f"The worker fell silent in each of {job.attempts} attempts, last {worker}."
        job.error_fix = (
            "Look at that machine's log for lost power, network or memory, then submit the job again."
        )
        data = {"code": job.error_code}
    if job.status is Status.QUEUED:
        Outbox(session).add(job.id, job.tenant)
    else:
        job.finished_at = utc_now(session)
    session.flush()
    events.append(session, job.id, "status", {"status": job.status, **data})
    session.refresh(job)
