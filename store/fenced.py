"""Everything a worker may write about the job it holds.

Each write carries the lease token: a worker that lost its lease, or whose job has ended, gets LeaseLost and
changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from store import durations, events, leases
from store.database import Database
from store.errors import LeaseLost
from store.leases import Loss
from store.plain import finite, plain
from store.tables import Attribution, Checkpoint, Job, Metric, SelectedExpert, Tenanted, now
from store.transitions import HELD, Status, sources


@dataclass(frozen=True)
class AttributionResult:
    """The score of every expert: `matrix` [num_moe_layers, num_experts] over the decoder layers `layers`."""

    score: str
    matrix: Sequence[Sequence[float]]
    layers: Sequence[int]
    stability: Mapping[str, Any]
    coverage: float


@dataclass(frozen=True)
class Selected:
    """An expert that is trained, and its score."""

    layer: int
    expert: int
    score: float


@dataclass(frozen=True)
class Measurement:
    """One figure; `chance` is the value that guessing gives, where that means something.

    A value that is no number (the model broke) is kept as null.
    """

    stage: str
    set: str
    domain: str
    name: str
    value: float
    n: int
    chance: float | None


class FencedJob:
    """A held job. Each call is a transaction of its own, except inside `with fenced.together():`."""

    def __init__(self, database: Database, job_id: str, token: int) -> None:
        self.database = database
        self.job_id = job_id
        self.token = token
        self._open: Session | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every write in the block is one transaction.

        (For one thread: the block is the object's, not the caller's.)
        """
        with self.database.write() as self._open:
            try:
                yield
            finally:
                self._open = None

    def phase(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of the phase `name` are done."""
        with self._held({"phase": name, "phase_done": done, "phase_total": total}) as (session, _):
            events.append(session, self.job_id, "phase", {"phase": name, "done": done, "total": total})

    def step(
        self, step: int, loss: float | None, seconds_left: float | None, data: Mapping[str, Any]
    ) -> None:
        """Training stands at `step`; `data` is what its event tells."""
        with self._held({"step": step, "loss": finite(loss), "seconds_left": seconds_left}) as (session, _):
            events.append(session, self.job_id, "step", dict(data))

    def event(self, type_: str, data: Mapping[str, Any]) -> None:
        """Something happened. Never any text of a set in `data`."""
        with self._held({}) as (session, _):
            events.append(session, self.job_id, type_, dict(data))

    def attribution(self, result: AttributionResult) -> None:
        """The score matrix; replaces that of an earlier attempt."""
        with self._held({}) as (session, tenant):
            session.execute(delete(Attribution).where(Attribution.job_id == self.job_id))
            session.add(
                Attribution(
                    job_id=self.job_id,
                    tenant=tenant,
                    score=result.score,
                    matrix=plain(result.matrix),
                    layers=plain(result.layers),
                    stability=plain(result.stability),
                    coverage=result.coverage,
                )
            )

    def selection(self, experts: Sequence[Selected]) -> None:
        """The experts that are trained, best first; replaces those of an earlier attempt."""
        rows = [
            SelectedExpert(job_id=self.job_id, layer=one.layer, expert=one.expert, rank=rank, score=one.score)
            for rank, one in enumerate(experts)
        ]
        self._replace(SelectedExpert, rows)

    def metrics(self, measurements: Sequence[Measurement]) -> None:
        """All figures of the job; replaces those of an earlier attempt."""
        rows = [
            Metric(
                job_id=self.job_id,
                stage=one.stage,
                set=one.set,
                domain=one.domain,
                name=one.name,
                value=finite(one.value),
                n=one.n,
                chance=one.chance,
            )
            for one in measurements
        ]
        self._replace(Metric, rows)

    def publish_checkpoint(self, checkpoint_id: str, size: int, manifest: Mapping[str, Any]) -> None:
        """The job's result lies complete in the artefact folder of `checkpoint_id`; `size` in bytes."""
        with self._held({"checkpoint_id": checkpoint_id}) as (session, tenant):
            session.add(
                Checkpoint(
                    id=checkpoint_id, job_id=self.job_id, tenant=tenant, bytes=size, manifest=plain(manifest)
                )
            )

    def succeed(self) -> None:
        """The job is done and its checkpoint published."""
        with self._session() as session:
            seconds = durations.of_phases(session, self.job_id, now())
        self._end(Status.SUCCEEDED, {"phase_seconds": seconds}, {})

    def fail(self, code: str, message: str, fix: str | None) -> None:
        """The job ends with an error a person can act on."""
        self._end(
            Status.FAILED,
            {"error_code": code, "error_message": plain(message), "error_fix": plain(fix)},
            {"code": code, "message": message},
        )

    def hand_back(self) -> None:
        """The worker stops, the job does not: back to the queue at once, and not counted as an attempt.

        A job that is being cancelled is cancelled.
        """
        self._end_attempt(None, 0)

    def lost(self, loss: Loss, max_attempts: int) -> None:
        """This attempt ended without a result: see store.leases.end_attempt."""
        self._end_attempt(loss, max_attempts)

    def check(self) -> None:
        """LeaseLost unless the lease is ours now. For right before an act outside the database."""
        with self._held({}):
            pass

    def _end_attempt(self, loss: Loss | None, max_attempts: int) -> None:
        with self._held({}) as (session, _):
            job = session.scalars(select(Job).where(Job.id == self.job_id)).one()
            leases.end_attempt(session, job, loss, max_attempts)

    def _end(self, status: Status, values: dict[str, Any], data: dict[str, Any]) -> None:
        ending = {"status": status, "finished_at": now(), "lease_worker": None, "lease_expires_at": None}
        with self._held(ending | values, sources(status) & HELD) as (session, _):
            events.append(session, self.job_id, "status", {"status": status, **data})

    def _replace(self, table: type[SelectedExpert] | type[Metric], rows: Sequence[Tenanted]) -> None:
        with self._held({}) as (session, tenant):
            session.execute(delete(table).where(table.job_id == self.job_id))
            for row in rows:
                row.tenant = tenant
            session.add_all(rows)

    @contextmanager
    def _held(
        self, values: dict[str, Any], statuses: frozenset[Status] = HELD
    ) -> Iterator[tuple[Session, str]]:
        """The fence: write `values` to the job if the lease is still ours, else raise LeaseLost.

        Yields session and tenant.

        The UPDATE also locks the job's row, so whatever the caller adds is written under the same fence.
        """
        query = (
            update(Job)
            .where(Job.id == self.job_id, Job.lease_token == self.token, Job.status.in_(statuses))
            .values({"lease_token": self.token} | values)  # an UPDATE must set something
            .returning(Job.tenant)
        )
        with self._session() as session:
            tenant = session.execute(
                query, execution_options={"synchronize_session": False}
            ).scalar_one_or_none()
            if tenant is None:
                raise LeaseLost(self.job_id, self.token)
            yield session, tenant

    @contextmanager
    def _session(self) -> Iterator[Session]:
        if self._open is not None:
            yield self._open
            self._open.flush()
            return
        with self.database.write() as session:
            yield session
