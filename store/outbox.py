"""Job ids that the broker has yet to be told: written with the job, published after the commit, then
marked.
"""

from collections.abc import Iterable, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from store.tables import OutboxMessage, now


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

    def _mark(self, condition: object) -> None:
        query = update(OutboxMessage).where(condition, OutboxMessage.published_at.is_(None))  # type: ignore[arg-type]
        self.session.execute(query.values(published_at=now()))
