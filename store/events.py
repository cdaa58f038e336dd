"""The numbered events of a job: gap-free, because the number is drawn from the job's row in the same
transaction.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from store import webhooks
from store.audit import SYSTEM, Audit
from store.errors import NotFoundError
from store.plain import plain
from store.repository import Repository
from store.tables import Event, Job
from store.transitions import FINAL, Status


class Head(NamedTuple):
    """How far a job has come: the number of its newest event, and whether that is its last."""

    job_id: str
    seq: int
    ended: bool


class Events(Repository):
    """Reads the events of one tenant's jobs."""

    def list(self, job_id: str, after: int = 0, limit: int = 100) -> Sequence[Event]:
        """Events of `job_id` with seq above `after`, in order.

        Empty for an unknown job (ask Jobs.get first).
        """
        query = self._select(Event).where(Event.job_id == job_id, Event.seq > after)
        return self.session.scalars(query.order_by(Event.seq).limit(limit)).all()

    def head(self, job_id: str) -> Head:
        """How far the job has come, or NotFoundError."""
        for head in self.heads([job_id]):
            return head
        raise NotFoundError("job", job_id)

    def heads(self, job_ids: Sequence[str]) -> Sequence[Head]:
        """How far each of these jobs has come, in one query; nothing for one that is not there.

        The number is written in the transaction of its event, so every event up to it can be read after this.
        """
        query = select(Job.id, Job.event_seq, Job.status).where(Job.tenant == self.tenant)
        rows = self.session.execute(query.where(Job.id.in_(job_ids)))
        return [Head(job_id, seq, status in FINAL) for job_id, seq, status in rows]

    def newest_of_finished(self, type_: str, model_id: str | None = None) -> Event | None:
        """The newest event of this type of a job that succeeded; of a job on this model, if one is given."""
        query = self._select(Event).join(Job, Job.id == Event.job_id)
        query = query.where(Event.type == type_, Job.status == Status.SUCCEEDED)
        if model_id is not None:
            query = query.where(Job.model_id == model_id)
        return self.session.scalars(query.order_by(Event.at.desc(), Event.seq.desc()).limit(1)).first()


def append(session: Session, job_id: str, type_: str, data: dict[str, Any], *, asked: bool = False) -> int:
    """Add the next event of a job; returns its seq. A "status" is told to webhooks, and is an act of the service in
    the audit log unless a caller `asked` for it: then the caller's own act stands there.

    The UPDATE holds the job's row until the transaction ends, so two writers take turns, a rollback gives
    the number back, and no reader sees number n + 1 before number n.
    """
    draw = update(Job).where(Job.id == job_id).values(event_seq=Job.event_seq + 1)
    seq, tenant = session.execute(
        draw.returning(Job.event_seq, Job.tenant), execution_options={"synchronize_session": False}
    ).one()
    _write(session, Event(job_id=job_id, seq=int(seq), tenant=tenant, type=type_, data=plain(data)), asked=asked)
    return int(seq)


def first(session: Session, job: Job) -> None:
    """The first event of a job that a caller has just asked for, and that was made with event_seq = 1."""
    assert job.event_seq == 1
    data = plain({"status": job.status})
    _write(session, Event(job_id=job.id, seq=1, tenant=job.tenant, type="status", data=data), asked=True)


def _write(session: Session, event: Event, *, asked: bool) -> None:
    session.add(event)
    session.flush()
    if event.type == "status":
        if not asked:
            what = "job.lost" if "lost" in event.data else f"job.{event.data['status']}"
            Audit(session, event.tenant).record(SYSTEM, what, event.job_id)
        webhooks.tell(session, event.tenant, event.job_id, event.seq, event.data)
