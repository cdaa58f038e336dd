"""Job ids that the broker has yet to be told: written with the job, published after the commit, then
marked.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from store.tables import Job, OutboxMessage, now
from store.transitions import Status


class Outbox:
    """The outbox of all tenants: the dispatcher serves every one of them."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, job_id: str, tenant: str) -> None:
        """A worker must be told of this job."""
        self.session.add(OutboxMessage(job_id=job_id, tenant=tenant))
        self.session.flush()

    def pending(self, limit: int = 100) -> Sequence[OutboxMessage]:
        """Unpublished messages, oldest first."""
        query = select(OutboxMessage).where(OutboxMessage.published_at.is_(None))
        return self.session.scalars(query.order_by(OutboxMessage.id).limit(limit)).all()

    def mark_published(self, ids: Iterable[int]) -> None:
        """These are with the broker now."""
        self._mark(OutboxMessage.id.in_(list(ids)))

    def settle(self, job_id: str) -> None:
        """Somebody took the job (or it ended): whatever message still waits for it is not needed any more."""
        self._mark(OutboxMessage.job_id == job_id)

    def reopen_lost(self, older_than_seconds: float) -> int:
        """Publish again what was published that long ago for jobs nobody has taken; returns how many.

        For a broker that holds no message any more: it has lost them.
        """
        newest = select(func.max(OutboxMessage.id)).join(Job, Job.id == OutboxMessage.job_id)
        waiting = newest.where(Job.status == Status.QUEUED).group_by(OutboxMessage.job_id)
        before = now() - timedelta(seconds=older_than_seconds)
        lost = update(OutboxMessage).where(OutboxMessage.id.in_(waiting), OutboxMessage.published_at < before)
        reopen = lost.values(published_at=None).returning(OutboxMessage.id)
        return len(self.session.execute(reopen, execution_options={"synchronize_session": False}).all())

    def _mark(self, condition: object) -> None:
        query = update(OutboxMessage).where(condition, OutboxMessage.published_at.is_(None))  # type: ignore[arg-type]
        self.session.execute(query.values(published_at=now()))
