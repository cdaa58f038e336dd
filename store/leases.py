"""Who holds a job: claim, heartbeat, expiry, and how an attempt ends that has no result. For workers, across tenants.

A claim raises the job's lease token; every later write of the worker carries it (store.fenced), so a worker
that lost its lease can change nothing. Each function runs in the caller's transaction.
"""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ScalarSelect, func, select, update
from sqlalchemy.orm import Session

from store import events, transitions
from store.database import utc_now
from store.outbox import Outbox
from store.tables import Job
from store.transitions import FINAL, HELD, Status


@dataclass(frozen=True)
class Claim:
    """The right to run a job, until the lease expires or somebody else's token is higher."""

    job_id: str
    token: int


@dataclass(frozen=True)
class Heartbeat:
    """`alive`: the lease is still ours and was extended. `cancel_requested`: stop the engine. `ended`: the job
    was brought to its end under this lease, so its engine is about to leave by itself.
    """

    alive: bool
    cancel_requested: bool
    ended: bool = False


@dataclass(frozen=True)
class Limits:
    """What a job may use; None where nothing bounds it. `seconds_left` of `max_seconds` since its first start."""

    max_seconds: float | None
    seconds_left: float | None
    max_memory_bytes: int | None


@dataclass(frozen=True)
class Loss:
    """Why an attempt ended without a result.

    Attributes:
        code: of the job's error, if it fails for this.
        what: a sentence that names what happened.
        fix: what a person can do.
        again: whether another attempt may fare better, so that the job goes back to the queue while it has some left.
    """

    code: str
    what: str
    fix: str
    again: bool = True


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


def limits(session: Session, held: Claim) -> Limits:
    """The limits of a job that has been claimed."""
    query = select(Job.started_at, Job.max_seconds, Job.max_memory_bytes).where(Job.id == held.job_id)
    started_at, max_seconds, max_memory_bytes = session.execute(query).one()
    left = None
    if max_seconds is not None and started_at is not None:
        left = max_seconds - (utc_now(session) - started_at).total_seconds()
    return Limits(max_seconds, left, max_memory_bytes)


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
    if row is not None:
        return Heartbeat(True, row.cancel_requested)
    ended = select(Job.id).where(Job.id == held.job_id, Job.lease_token == held.token, Job.status.in_(FINAL))
    return Heartbeat(False, False, session.execute(ended).one_or_none() is not None)


def release_expired(session: Session, max_attempts: int) -> list[Job]:
    """End every attempt whose lease has run out (see end_attempt); returns the jobs as they are now."""
    at = utc_now(session)
    expired = select(Job).where(Job.status.in_(HELD), Job.lease_expires_at < at).order_by(Job.id)
    jobs = list(session.scalars(expired.with_for_update(skip_locked=True)))
    for job in jobs:
        job.lost_leases += 1
        end_attempt(session, job, _silent(job), max_attempts)
    return jobs


def _silent(job: Job) -> Loss:
    return Loss(
        "WORKER_LOST",
        f"The worker {job.lease_worker} fell silent.",
        "Look at that machine's log for lost power, network or memory, then retry the job.",
    )


def end_attempt(session: Session, job: Job, loss: Loss | None, max_attempts: int) -> None:
    """Take a held job, whose row the caller has locked, from its worker, and say where it goes.

    A cancelling job is cancelled: nobody is left to stop. Else, without a loss (the worker was stopped in good order)
    it goes back to the queue and the attempt does not count. With one it goes back while attempts remain, and fails
    after that, or at once if another attempt would end the same way.
    """
    job.lease_token += 1  # fences a worker that is only silent at once, not when the next one claims
    job.lease_worker = job.lease_expires_at = None
    status, data = _after(job, loss, max_attempts)
    transitions.check(job.id, job.status, status)
    job.status = status
    if status is Status.QUEUED:
        Outbox(session).add(job.id, job.tenant)
    else:
        job.finished_at = utc_now(session)
    session.flush()
    events.append(session, job.id, "status", {"status": status, **data})
    session.refresh(job)


def _after(job: Job, loss: Loss | None, max_attempts: int) -> tuple[Status, dict[str, str]]:
    """The state after an attempt, and what its event tells; sets the job's error."""
    if job.status is Status.CANCELLING:
        return Status.CANCELLED, {}
    if loss is None:
        job.attempts -= 1
        return Status.QUEUED, {"reason": "Its worker was stopped."}
    if loss.again and job.attempts < max_attempts:
        return Status.QUEUED, {
            "lost": loss.code,
            "reason": f"{loss.what} Attempt {job.attempts} of {max_attempts} is lost.",
        }
    job.error_code, job.error_message, job.error_fix = loss.code, loss.what, loss.fix
    if loss.again:
        job.error_message += f" It was attempt {job.attempts} of {max_attempts}, and all were lost."
    return Status.FAILED, {"code": loss.code, "message": job.error_message}
