"""Jobs under any order of acts: submit, deliver, claim, beat, fall silent, cancel, write, lose, publish, sweep.

Hypothesis draws the acts; after each of them the invariants below must hold in the database and in the storage. The
store is real, on both databases; only its clock is ours.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select

from store import checkpoints, leases, outbox
from store.artefacts import Artefacts
from store.database import Database
from store.errors import LeaseLost, TransitionRefusedError
from store.fenced import AttributionResult, FencedJob, Measurement, Selected
from store.jobs import Jobs
from store.leases import Claim, Loss
from store.settings import Settings
from store.tables import Base, Checkpoint, Event, Job, OutboxMessage
from store.transitions import FINAL, HELD, Status, allowed
from tests.seeds import add_job, add_model, everything, get_job
from worker import dispatcher, sweeps

MAX_ATTEMPTS = 3
LEASE = 60.0
MOST_JOBS = 3
"""Few, so that acts meet each other."""
SILENT = Loss("ENGINE_LOST", "The engine was ended.", "Retry the job.")
HOPELESS = Loss("OUT_OF_MEMORY", "Memory ran out.", "Use less.", again=False)
RESULT = AttributionResult("contrast", [[0.5]], [0], {"runs": 2}, 0.8)
METRICS = [Measurement("after", "forget", "", "choice", 0.25, 4, 0.25)]
WRITES: dict[str, Callable[[FencedJob], None]] = {
    "phase": lambda job: job.phase("unlearning", 1, 2),
    "step": lambda job: job.step(1, 0.5, 2.0, {"step": 1}),
    "event": lambda job: job.event("look", {"step": 1}),
    "attribution": lambda job: job.attribution(RESULT),
    "selection": lambda job: job.selection([Selected(0, 1, 0.5)]),
    "metrics": lambda job: job.metrics(METRICS),
    "check": lambda job: job.check(),
    "fail": lambda job: job.fail("refused", "No.", "Change it."),
    "hand_back": lambda job: job.hand_back(),
    "lost": lambda job: job.lost(SILENT, MAX_ATTEMPTS),
    "hopeless": lambda job: job.lost(HOPELESS, MAX_ATTEMPTS),
}


class Clock:
    """The time of the store, which only goes where it is told."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def utc_now(self, _session: object = None) -> datetime:
        return self.at


class Queue:
    """A broker that delivers at least once, in order, and can lose everything or fall over while it is told."""

    def __init__(self) -> None:
        self.waiting: deque[str] = deque()
        self.falls_after: int | None = None

    def publish(self, job_id: str) -> None:
        self.waiting.append(job_id)
        if self.falls_after is not None:
            self.falls_after -= 1
            if self.falls_after < 0:
                raise ConnectionError

    def is_empty(self) -> bool:
        return not self.waiting


class Store(RuleBasedStateMachine):
    """Every claim ever given stays in the bundle: the stale ones are what a stopped worker goes on with."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self, database: Database, folder: Path, clock: Clock) -> None:
        super().__init__()
        self.database, self.clock, self.queue = database, clock, Queue()
        # A storage of its own for every run of the machine: the database is emptied, a folder would be left.
        self.settings = Settings(
            data_dir=folder / secrets.token_hex(8), database_url=str(database.url), orphan_grace_seconds=1e-9
        )
        self.artefacts = Artefacts.of(self.settings)
        self.model_id = ""
        self.tokens: dict[str, int] = {}
        self.ended: dict[str, tuple[Any, ...]] = {}

    @initialize()
    def an_empty_store(self) -> None:
        with self.database.write() as session:
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(delete(table))
        self.model_id = add_model(self.database)

    # What users do

    @precondition(lambda self: len(self.tokens) - len(self.ended) < MOST_JOBS)
    @rule(target=jobs)
    def submit(self) -> str:
        return add_job(self.database, model_id=self.model_id)

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        before = get_job(self.database, job).status
        with self.database.write() as session:
            if before in FINAL - {Status.CANCELLED}:
                with pytest.raises(TransitionRefusedError):
                    Jobs(session).request_cancel(job)
                return
            after = Jobs(session).request_cancel(job).status
        assert after is (Status.CANCELLING if before in HELD else Status.CANCELLED)

    # What the dispatcher and the broker do

    @rule(falls_after=st.none() | st.integers(0, 2))
    def dispatch(self, falls_after: int | None) -> None:
        """The outbox is published; perhaps the connection breaks after some messages, before they are marked."""
        self.queue.falls_after = falls_after
        try:
            dispatcher.publish_outbox(self.database, self.queue)
        except ConnectionError:
            pass
        else:
            assert self.unpublished() == set()
        finally:
            self.queue.falls_after = None

    @rule()
    def the_broker_forgets(self) -> None:
        self.queue.waiting.clear()

    @rule()
    def redispatch(self) -> None:
        self.resend()

    @rule(target=claims, again=st.booleans())
    def deliver(self, again: bool) -> Any:
        """A worker hears of a job; perhaps the message comes a second time."""
        if not self.queue.waiting:
            return multiple()
        job = self.queue.waiting.popleft()
        if again:
            self.queue.waiting.append(job)
        return self.claim(job)

    # What workers do

    @rule(target=claims, job=jobs)
    def claim_named(self, job: str) -> Any:
        return self.claim(job)

    @rule(target=claims)
    def claim_oldest(self) -> Any:
        return self.claim(None)

    @rule(claim=claims)
    def beat(self, claim: Claim) -> None:
        job, current = get_job(self.database, claim.job_id), self.is_current(claim)
        with self.database.write() as session:
            heard = leases.heartbeat(session, claim, LEASE)
        assert heard.alive == current
        assert heard.cancel_requested == (current and job.cancel_requested)
        if current:
            after = get_job(self.database, claim.job_id)
            assert after.lease_expires_at == self.clock.at + timedelta(seconds=LEASE)

    @rule(claim=claims, kind=st.sampled_from(sorted(WRITES)))
    def write(self, claim: Claim, kind: str) -> None:
        """A write of the current holder is done; one of a stale holder changes nothing at all."""
        self.fenced(claim, WRITES[kind])

    @rule(claim=claims)
    def publish(self, claim: Claim) -> None:
        """As the engine does: the folder under its name, then the row and the success together."""
        self.store_result(claim)
        if not self.fenced(claim, self.write_result):
            with self.database.read() as session:
                published = session.get(Checkpoint, checkpoints.id_of(claim.job_id, claim.token)) is not None
            if not published:
                self.artefacts.delete(key_of(claim))

    @rule(claim=claims)
    def fall_while_publishing(self, claim: Claim) -> None:
        """The engine is killed between the folder and the row."""
        self.store_result(claim)

    # What time does

    @rule(seconds=st.sampled_from([1, 30, 61, 3600]))
    def time_passes(self, seconds: int) -> None:
        self.clock.at += timedelta(seconds=seconds)

    @rule()
    def release(self) -> None:
        """The reconciler takes jobs from silent workers, and from nobody else."""
        before = {job.id: job for job in self.rows()}
        silent = {id_ for id_, job in before.items() if job.status in HELD and expired(job, self.clock.at)}
        with self.database.write() as session:
            released = {job.id: job.status for job in leases.release_expired(session, MAX_ATTEMPTS)}
        assert released.keys() == silent
        for id_, status in released.items():
            if before[id_].status is Status.CANCELLING:
                assert status is Status.CANCELLED
            else:
                attempts_left = before[id_].attempts < MAX_ATTEMPTS
                assert status is (Status.QUEUED if attempts_left else Status.FAILED)
                assert (id_ in self.unpublished()) == attempts_left

    @rule(target=claims, claim=claims)
    def is_taken_over_and_goes_on(self, claim: Claim) -> Any:
        """A worker falls silent, another takes its job, and the first one goes on as if nothing had been: chance alone
        seldom finds the way there."""
        if not self.is_current(claim):
            return multiple()
        self.clock.at += timedelta(seconds=LEASE + 1)
        self.release()
        taken = self.claim(claim.job_id)
        for act in (*WRITES.values(), self.write_result):
            assert not self.fenced(claim, act)
        return taken

    @rule()
    def sweep(self) -> None:
        """Whatever no row names, and none will, is deleted, however young; nothing else is."""
        sweeps.sweep_checkpoints(self.database, self.settings)
        named, stored = self.named(), self.stored()
        held = {checkpoints.id_of(job.id, job.lease_token) for job in self.rows() if job.status in HELD}
        assert named <= stored
        assert stored <= named | held, "an orphan outlived the sweep"

    # What must hold after each of them

    @invariant()
    def tokens_only_grow_and_attempts_are_bounded(self) -> None:
        for job in self.rows():
            assert job.lease_token >= self.tokens.get(job.id, 0)
            self.tokens[job.id] = job.lease_token
            assert 0 <= job.attempts <= min(MAX_ATTEMPTS, job.lease_token)

    @invariant()
    def whoever_is_held_has_a_lease_and_nobody_else_has(self) -> None:
        for job in self.rows():
            lease = (job.lease_worker is not None, job.lease_expires_at is not None)
            assert lease == ((True, True) if job.status in HELD else (False, False))

    @invariant()
    def the_end_is_the_end(self) -> None:
        for job in self.rows():
            if job.status in FINAL:
                row = tuple(
                    getattr(job, column.name) for column in Job.__table__.columns if column.name != "metadata"
                )
                assert self.ended.setdefault(job.id, row) == row
                assert job.finished_at is not None

    @invariant()
    def events_have_no_gap_and_tell_the_truth(self) -> None:
        with self.database.read() as session:
            events = session.scalars(select(Event).order_by(Event.job_id, Event.seq)).all()
        for job in self.rows():
            own = [event for event in events if event.job_id == job.id]
            assert [event.seq for event in own] == list(range(1, job.event_seq + 1))
            statuses = [Status(event.data["status"]) for event in own if event.type == "status"]
            assert statuses[0] is Status.QUEUED
            assert statuses[-1] is job.status
            assert all(allowed(before, after) for before, after in pairwise(statuses))

    @invariant()
    def results_have_their_bytes(self) -> None:
        assert self.named() <= self.stored()
        with self.database.read() as session:
            rows = {row.job_id: row.id for row in session.scalars(select(Checkpoint))}
        for job in self.rows():
            assert (job.status is Status.SUCCEEDED) == (job.id in rows)
            assert job.checkpoint_id == rows.get(job.id)

    @invariant()
    def a_queued_job_is_never_forgotten(self) -> None:
        """Its message waits in the outbox, or was published and can be sent again."""
        with self.database.read() as session:
            told = set(session.scalars(select(OutboxMessage.job_id)))
        assert {job.id for job in self.rows() if job.status is Status.QUEUED} <= told

    def teardown(self) -> None:
        """Left to honest workers and a broker that has lost everything, every job ends."""
        if not self.model_id:
            return
        self.queue.waiting.clear()
        self.clock.at += timedelta(days=1)
        self.release()
        self.resend()
        while self.queue.waiting:
            for claim in self.claim(self.queue.waiting.popleft()).values:
                self.publish(claim)
        self.clock.at += timedelta(days=1)
        self.sweep()
        assert all(job.status in FINAL for job in self.rows())
        assert self.stored() == self.named()

    # The means

    def rows(self) -> list[Job]:
        with self.database.read() as session:
            return list(session.scalars(select(Job)))

    def unpublished(self) -> set[str]:
        with self.database.read() as session:
            return {message.job_id for message in outbox.Outbox(session).pending(1000)}

    def is_current(self, claim: Claim) -> bool:
        job = get_job(self.database, claim.job_id)
        return job.status in HELD and job.lease_token == claim.token

    def claim(self, job: str | None) -> Any:
        """The claim, for the bundle: of the job if it is queued (of the oldest), else none."""
        queued = [
            row.id
            for row in sorted(self.rows(), key=lambda row: (row.created_at, row.id))
            if row.status is Status.QUEUED
        ]
        expected = (queued[0] if queued else None) if job is None else (job if job in queued else None)
        with self.database.write() as session:
            found = leases.claim(session, job, f"worker-{secrets.token_hex(2)}", LEASE)
        assert (found.job_id if found else None) == expected
        if found is None:
            return multiple()
        assert found.token > self.tokens.get(found.job_id, 0)
        assert found.job_id not in self.unpublished()
        return multiple(found)

    def fenced(self, claim: Claim, act: Callable[[FencedJob], None]) -> bool:
        """Do it if the lease is current; else see that it is refused and that no row of any table has changed."""
        job = FencedJob(self.database, claim.job_id, claim.token)
        if self.is_current(claim):
            act(job)
            return True
        before = everything(self.database)
        with pytest.raises(LeaseLost):
            act(job)
        assert everything(self.database) == before
        return False

    def write_result(self, job: FencedJob) -> None:
        with job.together():
            job.metrics(METRICS)
            job.publish_checkpoint(checkpoints.id_of(job.job_id, job.token), 1, {"files": []})
            job.succeed()

    def store_result(self, claim: Claim) -> None:
        """What an engine asks before: is the lease ours? Then the folder gets its name, if it has not got it yet."""
        if self.is_current(claim) and not self.artefacts.exists(key_of(claim)):
            with self.artefacts.open_write(f"{key_of(claim)}/model.safetensors") as file:
                file.write(b"weights")

    def stored(self) -> set[str]:
        folder = self.artefacts.path("checkpoints")
        return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()

    def named(self) -> set[str]:
        with self.database.read() as session:
            return set(session.scalars(select(Checkpoint.id)))

    def resend(self) -> None:
        """Whatever the broker lost is with it again, once it is empty."""
        self.clock.at += timedelta(seconds=1)
        was_empty = self.queue.is_empty()
        dispatcher.resend_lost(self.database, self.queue, older_than_seconds=0)
        dispatcher.publish_outbox(self.database, self.queue)
        if was_empty:
            queued = {job.id for job in self.rows() if job.status is Status.QUEUED}
            assert queued <= set(self.queue.waiting)


def key_of(claim: Claim) -> str:
    return checkpoints.artefact_key(checkpoints.id_of(claim.job_id, claim.token))


def expired(job: Job, at: datetime) -> bool:
    return job.lease_expires_at is not None and job.lease_expires_at < at


@pytest.mark.parametrize("examples", [50, pytest.param(200, marks=pytest.mark.long)])
def test_jobs_under_any_order_of_acts(
    examples: int, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(leases, "utc_now", clock.utc_now)
    monkeypatch.setattr(outbox, "now", clock.utc_now)
    run_state_machine_as_test(
        lambda: Store(database, tmp_path, clock),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
