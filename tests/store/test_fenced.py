"""Fenced writers: with the lease they write, without it they change nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from store import leases
from store.checkpoints import Checkpoints
from store.database import Database
from store.errors import LeaseLost
from store.events import Events
from store.fenced import AttributionResult, FencedJob, Measurement, Selected
from store.jobs import Jobs
from store.outbox import Outbox
from store.results import Results
from tests.seeds import add_running, everything, get_job

WRITERS: dict[str, Callable[[FencedJob], None]] = {
    "phase": lambda held: held.phase("unlearning", 1, 2),
    "step": lambda held: held.step(3, 0.25, 9.5, {"step": 3}),
    "event": lambda held: held.event("rung", {"strength": 2}),
    "attribution": lambda held: held.attribution(
        AttributionResult("contrast", [[0.1, 0.9], [0.5, 0.5]], [1, 2], {"runs": 3}, 0.75)
    ),
    "selection": lambda held: held.selection([Selected(2, 1, 0.9), Selected(1, 0, 0.4)]),
    "metrics": lambda held: held.metrics(
        [
            Measurement("before", "forget", "law", "choice", 0.75, 40, 0.25),
            Measurement("before", "forget", "law", "open", 0.5, 40, None),
        ]
    ),
    "publish_checkpoint": lambda held: held.publish_checkpoint("ckpt_1", 1234, {"files": []}),
    "succeed": FencedJob.succeed,
    "hand_back": FencedJob.hand_back,
    "fail": lambda held: held.fail("dense_model", "The model has no experts.", "Use scope full."),
    "lost": lambda held: held.lost(LOSS, 3),
}
LOSS = leases.Loss("ENGINE_LOST", "The engine was ended by SIGSEGV.", "Retry the job.")


def test_the_list_is_complete() -> None:
    public = {name for name, _ in inspect.getmembers(FencedJob, inspect.isfunction) if name[0] != "_"}
    assert public - {"together", "check"} == WRITERS.keys()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_stale_token_writes_nothing(database: Database, writer: str) -> None:
    held = add_running(database)
    before = everything(database)
    for token in (held.token - 1, held.token + 1):
        with pytest.raises(LeaseLost, match=held.job_id):
            WRITERS[writer](FencedJob(database, held.job_id, token))
    assert everything(database) == before
    WRITERS[writer](held)
    assert everything(database) != before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_an_ended_job_takes_no_more_writes(database: Database, end: str, writer: str) -> None:
    held = add_running(database)
    WRITERS[end](held)
    before = everything(database)
    with pytest.raises(LeaseLost):
        WRITERS[writer](held)
    assert everything(database) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_handed_back_job_takes_no_more_writes(database: Database, writer: str) -> None:
    held = add_running(database)
    held.hand_back()
    before = everything(database)
    with pytest.raises(LeaseLost):
        WRITERS[writer](held)
    assert everything(database) == before


def test_handing_back_is_not_an_attempt(database: Database) -> None:
    held = add_running(database)
    held.hand_back()
    job = get_job(database, held.job_id)
    assert (job.status, job.attempts, job.lease_worker, job.lease_expires_at) == ("queued", 0, None, None)
    with database.write() as session:
        assert [message.job_id for message in Outbox(session).pending()] == [held.job_id]
        again = leases.claim(session, held.job_id, "worker-2", 60)
    assert again is not None
    assert again.token > held.token


@pytest.mark.parametrize("writer", ["hand_back", "lost"])
def test_a_cancelling_job_whose_worker_lets_go_is_cancelled(database: Database, writer: str) -> None:
    held = add_running(database)
    with database.write() as session:
        Jobs(session).request_cancel(held.job_id)
    WRITERS[writer](held)
    job = get_job(database, held.job_id)
    assert (job.status, job.error_code, job.lease_expires_at) == ("cancelled", None, None)
    assert job.finished_at is not None
    with database.read() as session:
        assert Outbox(session).pending() == []
        assert Events(session).list(held.job_id)[-1].data == {"status": "cancelled"}


def test_a_lost_attempt_counts_and_is_told(database: Database) -> None:
    held = add_running(database)
    held.lost(LOSS, 2)
    job = get_job(database, held.job_id)
    assert (job.status, job.attempts, job.lost_leases, job.error_code) == ("queued", 1, 0, None)
    with database.read() as session:
        assert [message.job_id for message in Outbox(session).pending()] == [held.job_id]
        assert Events(session).list(held.job_id)[-1].data == {
            "status": "queued",
            "lost": "ENGINE_LOST",
            "reason": "The engine was ended by SIGSEGV. Attempt 1 of 2 is lost.",
        }


def test_the_last_lost_attempt_fails_the_job(database: Database) -> None:
    held = add_running(database)
    held.lost(LOSS, 1)
    job = get_job(database, held.job_id)
    assert (job.status, job.error_code, job.error_fix) == ("failed", "ENGINE_LOST", "Retry the job.")
    assert job.error_message == "The engine was ended by SIGSEGV. It was attempt 1 of 1, and all were lost."


def test_a_loss_that_would_come_again_fails_the_job_at_once(database: Database) -> None:
    held = add_running(database)
    held.lost(leases.Loss("OUT_OF_MEMORY", "Memory ran out.", "Use less.", again=False), 3)
    job = get_job(database, held.job_id)
    assert (job.status, job.error_code, job.error_message) == ("failed", "OUT_OF_MEMORY", "Memory ran out.")


def test_a_check_finds_a_lost_lease_and_writes_nothing(database: Database) -> None:
    held = add_running(database)
    before = everything(database)
    held.check()
    with pytest.raises(LeaseLost):
        FencedJob(database, held.job_id, held.token - 1).check()
    assert everything(database) == before


def test_what_json_or_postgres_cannot_hold(database: Database) -> None:
    """JSON has no NaN, Postgres refuses NaN and NUL in JSONB, and SQLite turns NaN into NULL by itself."""
    held = add_running(database)
    nan = float("nan")
    held.step(1, nan, None, {"loss": nan, "parts": (1.0, float("inf"))})
    held.event("warning", {"message": "a\0b"})
    held.metrics([Measurement("after", "forget", "", "open", nan, 3, None)])
    held.attribution(AttributionResult("contrast", [[nan, 0.5]], [0], {"spread": nan}, 1.0))
    assert get_job(database, held.job_id).loss is None
    with database.read() as session:
        step, warning = Events(session).list(held.job_id)[-2:]
        assert step.data == {"loss": None, "parts": [1.0, None]}
        assert warning.data == {"message": "ab"}
        results = Results(session)
        assert results.metrics(held.job_id)[0].value is None
        attribution = results.attribution(held.job_id)
        assert attribution is not None
        assert (attribution.matrix, attribution.stability) == ([[None, 0.5]], {"spread": None})


def test_progress_is_on_the_job_and_in_the_events(database: Database) -> None:
    held = add_running(database)
    held.phase("unlearning", 1, 2)
    held.step(3, 0.25, 9.5, {"step": 3, "loss": 0.25})
    held.event("rung", {"strength": 2})
    job = get_job(database, held.job_id)
    assert (job.phase, job.phase_done, job.phase_total) == ("unlearning", 1, 2)
    assert (job.step, job.loss, job.seconds_left) == (3, 0.25, 9.5)
    with database.read() as session:
        events = [(event.seq, event.type, event.data) for event in Events(session).list(held.job_id, after=2)]
    assert events == [
        (3, "phase", {"phase": "unlearning", "done": 1, "total": 2}),
        (4, "step", {"step": 3, "loss": 0.25}),
        (5, "rung", {"strength": 2}),
    ]


def test_results_are_read_back_and_replaced(database: Database) -> None:
    held = add_running(database)
    for _ in range(2):  # a second attempt writes the same again
        for writer in ("attribution", "selection", "metrics"):
            WRITERS[writer](held)
    with database.read() as session:
        results = Results(session)
        attribution = results.attribution(held.job_id)
        assert attribution is not None
        assert (attribution.score, attribution.matrix) == ("contrast", [[0.1, 0.9], [0.5, 0.5]])
        assert (attribution.layers, attribution.stability) == ([1, 2], {"runs": 3})
        assert attribution.coverage == 0.75
        chosen = [(one.rank, one.layer, one.expert, one.score) for one in results.selection(held.job_id)]
        assert chosen == [(0, 2, 1, 0.9), (1, 1, 0, 0.4)]
        figures = [(m.name, m.value, m.n, m.chance) for m in results.metrics(held.job_id)]
        assert figures == [("choice", 0.75, 40, 0.25), ("open", 0.5, 40, None)]
    held.selection([Selected(0, 0, 1.0)])
    with database.read() as session:
        assert [one.layer for one in Results(session).selection(held.job_id)] == [0]


def test_publish_and_succeed_together(database: Database) -> None:
    held = add_running(database)
    with held.together():
        held.publish_checkpoint("ckpt_1", 1234, {"files": ["a"]})
        held.succeed()
    job = get_job(database, held.job_id)
    assert (job.status, job.checkpoint_id, job.lease_worker) == ("succeeded", "ckpt_1", None)
    assert job.finished_at is not None
    with database.read() as session:
        checkpoint = Checkpoints(session).get("ckpt_1")
    assert (checkpoint.job_id, checkpoint.bytes, checkpoint.manifest) == (held.job_id, 1234, {"files": ["a"]})


def test_together_is_all_or_nothing(database: Database) -> None:
    held = add_running(database)
    before = everything(database)
    with pytest.raises(RuntimeError), held.together():  # noqa: PT012
        held.publish_checkpoint("ckpt_1", 1234, {})
        raise RuntimeError
    assert everything(database) == before
    held.succeed()  # and afterwards each call is a transaction of its own again
    assert get_job(database, held.job_id).status == "succeeded"


def test_failure_says_what_and_how(database: Database) -> None:
    held = add_running(database)
    held.fail("dense_model", "The model has no experts." * 500, "Use scope full.")
    job = get_job(database, held.job_id)
    assert (job.status, job.error_code, job.error_fix) == ("failed", "dense_model", "Use scope full.")
    assert job.error_message == "The model has no experts." * 500
    with database.read() as session:
        last = Events(session).list(held.job_id)[-1]
    assert (last.type, last.data["status"], last.data["code"]) == ("status", "failed", "dense_model")
