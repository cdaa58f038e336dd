"""What the rows say about stored bytes: which are named, which may still be, which are not needed any more.

For sweeps, across tenants. Each function runs in the caller's transaction.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import InstrumentedAttribute

from store.checkpoints import id_of
from store.database import utc_now
from store.tables import Checkpoint, File, Job, Upload
from store.transitions import FINAL, HELD, RETRIABLE

_CHUNK = 500
_Column = InstrumentedAttribute[str] | InstrumentedAttribute[str | None]


def wanted_checkpoints(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these checkpoint folders that have a row, or whose job is held by the lease that may still write it.

    List the folders before, not after: a folder gets its name from the holder of a lease. If that lease is gone when
    it is asked for here, no row can follow (store.fenced), and one that came before is found, because rows are read
    after leases. So no age needs to be known.
    """
    held = select(Job.id, Job.lease_token).where(Job.status.in_(HELD))
    coming = {id_of(job_id, token) for job_id, token in session.execute(held)}
    return (coming & set(ids)) | _among(session, Checkpoint.id, ids)


def wanted_files(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these files that have a row and are not deleted."""
    gone = _among(session, File.id, ids, File.deleted_at.is_not(None))
    return _among(session, File.id, ids) - gone


def wanted_uploads(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these uploads that have a row."""
    return _among(session, Upload.id, ids)


def checkpoint_ids(session: Session) -> Sequence[str]:
    """Every checkpoint that has a row."""
    return session.scalars(select(Checkpoint.id)).all()


def file_ids(session: Session) -> Sequence[str]:
    """Every file that has a row and is not deleted."""
    return session.scalars(select(File.id).where(File.deleted_at.is_(None))).all()


def known_jobs(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these jobs that have a row."""
    return _among(session, Job.id, ids)


def ended_jobs(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these jobs that have ended."""
    return _among(session, Job.id, ids, Job.status.in_(FINAL))


def done_with_work(session: Session, ids: Collection[str], keep_days: float) -> set[str]:
    """Those of these jobs whose work folder is of no more use.

    A job that has its result needs none. One that failed or was cancelled keeps it for a retry, for so many days after
    its end, and longer while a retry of it is not finished.
    """
    before = utc_now(session) - timedelta(days=keep_days)
    finished = _among(session, Job.id, ids, Job.status.in_(FINAL - RETRIABLE))
    old = _among(session, Job.id, ids, Job.status.in_(RETRIABLE) & (Job.finished_at < before))
    return finished | (old - _among(session, Job.retry_of, old, Job.status.not_in(FINAL)))


def _among(
    session: Session, column: _Column, ids: Collection[str], *conditions: ColumnElement[bool]
) -> set[str]:
    """The values of `column` that are among `ids`, in rows that meet the conditions."""
    wanted, found = list(ids), set[str]()
    for start in range(0, len(wanted), _CHUNK):
        query = select(column).where(column.in_(wanted[start : start + _CHUNK]), *conditions)
        found.update(value for value in session.scalars(query) if value is not None)
    return found
