"""Jobs of one tenant: create, retry, look, list, cancel.

What workers do with them is store.leases and store.fenced.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self

from store import events, transitions
from store.errors import NotFoundError, TransitionRefusedError
from store.files import Files
from store.ids import new_id
from store.outbox import Outbox
from store.repository import Page, Repository
from store.tables import Job, now
from store.transitions import RETRIABLE, Status


@dataclass(frozen=True)
class SetRef:
    """A set a job reads: the id of its file and the digest of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class JobSpec:
    """What a job is asked to do. `method` is fully resolved (nothing left to a preset)."""

    model_id: str
    forget: SetRef
    method: Mapping[str, Any]
    seed: int
    retain: SetRef | None = None
    evaluation: SetRef | None = None
    metadata: Mapping[str, str] | None = None
    request_id: str | None = None
    traceparent: str | None = None
    max_seconds: float | None = None
    max_memory_bytes: int | None = None
    retry_of: str | None = None


class Moment(NamedTuple):
    """What tells one state of a job from another: whatever else of it is shown changes with an event."""

    status: Status
    event_seq: int
    attempts: int
    cancel_requested: bool
    checkpoint_id: str | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """The moment of a job."""
        return cls(*(getattr(job, name) for name in cls._fields))


class Jobs(Repository):
    """The jobs of one tenant."""

    def create(self, spec: JobSpec) -> Job:
        """A queued job, its first event and its outbox message, all in the caller's transaction."""
        retain, evaluation = spec.retain, spec.evaluation
        job = Job(
            id=new_id("job"),
            status=Status.QUEUED,
            model_id=spec.model_id,
            forget_file=spec.forget.file,
            forget_sha256=spec.forget.sha256,
            retain_file=retain.file if retain else None,
            retain_sha256=retain.sha256 if retain else None,
            evaluation_file=evaluation.file if evaluation else None,
            evaluation_sha256=evaluation.sha256 if evaluation else None,
            method=dict(spec.method),
            seed=spec.seed,
            meta=dict(spec.metadata or {}),
            request_id=spec.request_id,
            traceparent=spec.traceparent,
            max_seconds=spec.max_seconds,
            max_memory_bytes=spec.max_memory_bytes,
            retry_of=spec.retry_of,
            event_seq=1,
        )
        self._add(job)
        events.first(self.session, job)
        Outbox(self.session).add(job.id, self.tenant)
        return job

    def retry(self, job_id: str, request_id: str | None = None, traceparent: str | None = None) -> Job:
        """A new job that asks for the same as a failed or cancelled one, and goes on from what that has saved.

        TransitionRefusedError for a job in another state; FileDeletedError when one of its sets was deleted.
        """
        old = self.get(job_id)
        if old.status not in RETRIABLE:
            raise TransitionRefusedError(
                f"{job_id} is {old.status} and cannot be retried.",
                f"Only a job that is {' or '.join(sorted(RETRIABLE))} can.",
            )
        sets = [
            SetRef(Files(self.session, self.tenant).held(file).id, sha256) if file and sha256 else None
            for file, sha256 in (
                (old.forget_file, old.forget_sha256),
                (old.retain_file, old.retain_sha256),
                (old.evaluation_file, old.evaluation_sha256),
            )
        ]
        assert sets[0] is not None
        spec = JobSpec(
            model_id=old.model_id,
            forget=sets[0],
            retain=sets[1],
            evaluation=sets[2],
            method=old.method,
            seed=old.seed,
            metadata=old.meta,
            request_id=request_id,
            traceparent=traceparent,
            max_seconds=old.max_seconds,
            max_memory_bytes=old.max_memory_bytes,
            retry_of=old.id,
        )
        return self.create(spec)

    def get(self, job_id: str) -> Job:
        """The job, or NotFoundError."""
        return self._one(self._select(Job).where(Job.id == job_id), "job", job_id)

    def moment(self, job_id: str) -> Moment:
        """Where the job stands, without the rest of it. NotFoundError."""
        columns = (getattr(Job, name) for name in Moment._fields)
        query = self._select(Job).where(Job.id == job_id).with_only_columns(*columns)
        row = self.session.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("job", job_id)
        return Moment(*row)

    def list(
        self,
        cursor: str | None = None,
        limit: int = 20,
        statuses: Collection[Status] = (),
        model_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Page[Job]:
        """Newest first; every given filter must match.

        `statuses`: one of them; `metadata`: keys whose value must equal; `created_after` that time or later.
        """
        query = self._select(Job)
        if statuses:
            query = query.where(Job.status.in_(statuses))
        if created_after is not None:
            query = query.where(Job.created_at >= created_after)
        if created_before is not None:
            query = query.where(Job.created_at < created_before)
        if model_id is not None:
            query = query.where(Job.model_id == model_id)
        for key, value in (metadata or {}).items():
            query = query.where(Job.meta[key].as_string() == value)
        return self._page(query, Job, cursor, limit)

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a job.

        A queued one at once; a running one becomes `cancelling` until its worker has stopped it.

        Asking again while it is cancelling or cancelled changes nothing. TransitionRefusedError when it
        has ended otherwise.
        """
        # The lock makes this and a worker's claim or final write take turns (SQLite: BEGIN IMMEDIATE does).
        locked = self._select(Job).where(Job.id == job_id).with_for_update()
        job = self._one(locked.execution_options(populate_existing=True), "job", job_id)
        if job.status in (Status.CANCELLING, Status.CANCELLED):
            return job
        after = Status.CANCELLED if job.status is Status.QUEUED else Status.CANCELLING
        transitions.check(job.id, job.status, after)
        job.status, job.cancel_requested = after, True
        if after is Status.CANCELLED:
            job.finished_at = now()
            Outbox(self.session).settle(job.id)
        self.session.flush()
        events.append(self.session, job.id, "status", {"status": after}, asked=True)
        self.session.refresh(job)
        return job
