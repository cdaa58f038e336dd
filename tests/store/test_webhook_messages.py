"""What is told: written with the event or not at all, to whom it concerns, and never in the way of a deletion."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from sqlalchemy import select

from store import webhooks
from store.audit import Audit
from store.database import Database
from store.fenced import FencedJob
from store.jobs import Jobs
from store.tables import WebhookDelivery, WebhookMessage
from store.transitions import Status
from store.webhooks import JOB_TYPES, Webhooks
from tests.seeds import add_job, add_running, get_job


def make(database: Database, tenant: str = "default", events: Sequence[str] = JOB_TYPES) -> str:
    with database.write() as session:
        return Webhooks(session, tenant).create("https://example.com/", "", events, "sealed").id


def told(database: Database, hook: str) -> list[str]:
    """Types of what waits for this webhook, in the order of the events."""
    with database.read() as session:
        query = select(WebhookMessage.type).join(
            WebhookDelivery, WebhookDelivery.message_id == WebhookMessage.id
        )
        return list(
            session.scalars(query.where(WebhookDelivery.webhook_id == hook).order_by(WebhookMessage.seq))
        )


def end(job: FencedJob, how: str) -> None:
    if how == "succeeded":
        job.succeed()
    elif how == "failed":
        job.fail("X", "", None)
    else:
        with job.database.write() as session:
            Jobs(session).request_cancel(job.job_id)
        job.hand_back()


@pytest.mark.parametrize(
    ("how", "states"),
    [("succeeded", ["succeeded"]), ("failed", ["failed"]), ("cancelled", ["cancelling", "cancelled"])],
)
def test_every_change_of_state_is_told_and_nothing_else(
    database: Database, how: str, states: list[str]
) -> None:
    hook = make(database)
    job = add_running(database)
    job.phase("unlearning", 1, 2)
    job.event("warning", {"code": "x"})
    end(job, how)
    assert told(database, hook) == [f"job.{state}" for state in ["queued", "running", *states]]


def test_every_state_of_a_job_has_its_type() -> None:
    assert set(JOB_TYPES) == {f"job.{status}" for status in Status}


def test_what_is_rolled_back_was_never_told(database: Database) -> None:
    hook = make(database)
    job = add_running(database)

    def fail() -> None:
        with job.together():
            job.succeed()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert told(database, hook) == ["job.queued", "job.running"]
    assert get_job(database, job.job_id).status is Status.RUNNING


def test_only_to_its_own_tenant_and_only_what_is_wanted(database: Database) -> None:
    ours, theirs, few = make(database), make(database, "other"), make(database, events=["job.running"])
    add_running(database)
    assert told(database, ours) == ["job.queued", "job.running"]
    assert told(database, theirs) == []
    assert told(database, few) == ["job.running"]


def test_nobody_to_tell_leaves_no_message(database: Database) -> None:
    make(database, events=["job.failed"])
    add_running(database)
    with database.read() as session:
        assert session.scalars(select(WebhookMessage)).all() == []


def test_a_message_is_taken_once_by_whoever_is_first(database: Database) -> None:
    hook = make(database)
    add_job(database)
    with database.write() as session:
        assert webhooks.due(session, [], 5) == [hook]
        assert webhooks.due(session, [hook], 5) == []
        first = webhooks.take(session, hook, 60)
    with database.write() as session:
        assert webhooks.take(session, hook, 60) is None
        assert webhooks.due(session, [], 5) == []
    assert first is not None
    assert (first.number, first.type, first.secrets) == (1, "job.queued", ("sealed",))


def test_webhooks_come_and_go_while_jobs_run(database: Database) -> None:
    """Deleting, changing and sending hold locks of a webhook and of the audit chain; so does every job. None may
    fail or wait for ever.
    """
    errors: list[BaseException] = []
    ended = threading.Event()

    def guarded(act: object) -> None:
        try:
            act()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    def come_and_go() -> None:
        while not ended.is_set():
            hook = make(database)
            with database.write() as session:
                parcel = webhooks.take(session, hook, 60)
            if parcel is not None:
                with database.write() as session:
                    Webhooks(session).disable(Webhooks(session).held(hook))
            with database.write() as session:
                Webhooks(session).delete(hook)
                Audit(session).record("key_1", "webhook.delete", hook)

    def run() -> None:
        for _ in range(12):
            end(add_running(database), "failed")

    others = [threading.Thread(target=guarded, args=(come_and_go,)) for _ in range(2)]
    jobs = [threading.Thread(target=guarded, args=(run,)) for _ in range(2)]
    for thread in others + jobs:
        thread.start()
    for thread in jobs:
        thread.join(60)
    ended.set()
    for thread in others:
        thread.join(60)
    assert errors == []
    assert not any(thread.is_alive() for thread in others + jobs)
