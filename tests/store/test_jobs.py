"""Jobs: create, look, list, cancel."""

import base64
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import update

from store.database import Database
from store.errors import InvalidCursorError, NotFoundError, TransitionRefusedError
from store.events import Events
from store.fenced import FencedJob
from store.jobs import Jobs, JobSpec, SetRef
from store.outbox import Outbox
from store.tables import Job
from store.transitions import Status
from tests.seeds import add_file, add_job, add_model, add_running, everything, get_job


def events_of(database: Database, job_id: str) -> list[tuple[int, str, dict[str, Any]]]:
    with database.read() as session:
        return [(event.seq, event.type, event.data) for event in Events(session).list(job_id)]


def test_create_writes_job_event_and_outbox_together(database: Database) -> None:
    model_id, file_id = add_model(database), add_file(database)
    retain = SetRef(add_file(database, "retain"), "1" * 64)
    with database.write() as session:
        spec = JobSpec(
            model_id, SetRef(file_id, "0" * 64), {"steps": 3}, 7, retain, metadata={"ticket": "4711"}
        )
        job = Jobs(session).create(spec)
    assert (job.status, job.attempts, job.lease_token, job.event_seq) == ("queued", 0, 0, 1)
    assert (job.forget_file, job.retain_sha256, job.evaluation_file) == (file_id, "1" * 64, None)
    assert (job.method, job.seed, job.meta) == ({"steps": 3}, 7, {"ticket": "4711"})
    assert (job.phase, job.cancel_requested, job.checkpoint_id) == (None, False, None)
    assert events_of(database, job.id) == [(1, "status", {"status": "queued"})]
    with database.read() as session:
        assert [message.job_id for message in Outbox(session).pending()] == [job.id]
        assert Jobs(session).get(job.id).created_at == job.created_at


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    model_id, before = add_model(database), None
    before = everything(database)
    with pytest.raises(RuntimeError), database.write() as session:  # noqa: PT012
        Jobs(session).create(JobSpec(model_id, SetRef("file_x", "0" * 64), {}, 0))
        raise RuntimeError
    assert everything(database) == before


def test_lists_page_through_equal_times_without_losing_or_repeating(database: Database) -> None:
    model_id = add_model(database)
    ids = [add_job(database, model_id=model_id) for _ in range(7)]
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with database.write() as session:
        session.execute(update(Job).where(Job.id.in_(ids[:5])).values(created_at=moment))
    seen: list[str] = []
    cursor, pages = None, 0
    with database.read() as session:
        while pages == 0 or cursor is not None:
            page = Jobs(session).list(cursor, limit=2)
            assert page.has_more is (page.next is not None)
            seen += [job.id for job in page.data]
            cursor, pages = page.next, pages + 1
    assert pages == 4
    assert seen == [ids[6], ids[5], *sorted(ids[:5], reverse=True)]


def test_list_filters(database: Database) -> None:
    model_id = add_model(database)
    one = add_job(database, model_id=model_id, metadata={"team": "a", "ticket": "1"})
    two = add_job(database, metadata={"team": "a"})
    running = add_running(database).job_id

    def ids(**filters: Any) -> list[str]:
        with database.read() as session:
            return [job.id for job in Jobs(session).list(**filters).data]

    assert ids() == [running, two, one]
    assert ids(statuses=[Status.RUNNING]) == [running]
    assert ids(model_id=model_id) == [one]
    assert ids(metadata={"team": "a"}) == [two, one]
    assert ids(metadata={"team": "a", "ticket": "1"}) == [one]
    assert ids(metadata={"team": "a"}, statuses=[Status.RUNNING]) == []


WITH_NUL = base64.urlsafe_b64encode(b"2026-01-01T00:00:00+00:00|job_\0x").decode()


@pytest.mark.parametrize("cursor", ["", "x", "eA==", "MjAyNi0wMS0wMXxqb2I=", "ü", WITH_NUL])
def test_a_foreign_cursor_is_refused(database: Database, cursor: str) -> None:
    with database.read() as session, pytest.raises(InvalidCursorError, match="cursor"):
        Jobs(session).list(cursor)


def test_get_names_what_is_missing(database: Database) -> None:
    with database.read() as session, pytest.raises(NotFoundError, match="job_nobody"):
        Jobs(session).get("job_nobody")


def cancel(database: Database, job_id: str) -> Job:
    with database.write() as session:
        return Jobs(session).request_cancel(job_id)


def test_cancel_a_queued_job_ends_it(database: Database) -> None:
    job_id = add_job(database)
    job = cancel(database, job_id)
    assert (job.status, job.cancel_requested) == ("cancelled", True)
    assert job.finished_at is not None
    assert events_of(database, job_id)[1:] == [(2, "status", {"status": "cancelled"})]
    with database.read() as session:
        assert Outbox(session).pending() == []


def test_cancel_a_running_job_asks_its_worker(database: Database) -> None:
    held = add_running(database)
    job = cancel(database, held.job_id)
    assert (job.status, job.cancel_requested, job.finished_at) == ("cancelling", True, None)
    assert events_of(database, held.job_id)[-1] == (3, "status", {"status": "cancelling"})


def test_cancel_twice_changes_nothing(database: Database) -> None:
    queued, held = add_job(database), add_running(database)
    for job_id in (queued, held.job_id):
        cancel(database, job_id)
    before = everything(database)
    assert cancel(database, queued).status == "cancelled"
    assert cancel(database, held.job_id).status == "cancelling"
    assert everything(database) == before


@pytest.mark.parametrize("end", [FencedJob.succeed, lambda held: held.fail("x", "y", None)])
def test_cancel_an_ended_job_is_refused(database: Database, end: Any) -> None:
    held = add_running(database)
    end(held)
    before = everything(database)
    with pytest.raises(TransitionRefusedError, match=held.job_id):
        cancel(database, held.job_id)
    assert everything(database) == before


def test_cancel_and_result_may_cross(database: Database) -> None:
    """A cancel that comes when the result is complete does not throw the result away."""
    held = add_running(database)
    cancel(database, held.job_id)
    held.succeed()
    assert get_job(database, held.job_id).status == "succeeded"
