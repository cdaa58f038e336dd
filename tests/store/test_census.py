"""The service in numbers: each figure against rows made for it, and sums that stay cheap and right."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, update

from store import census, duties, leases
from store.audit import Audit
from store.census import BOUNDS, Durations, Watch
from store.database import Database, utc_now
from store.ids import new_id
from store.jobs import Jobs
from store.outbox import Outbox
from store.tables import (
    AuditHead,
    Checkpoint,
    File,
    Job,
    Upload,
    UploadPart,
    Webhook,
    WebhookDelivery,
    WebhookMessage,
)
from tests.seeds import add_file, add_job, add_running, get_job

TENANTS = ("default", "other")


def shift(database: Database, job_id: str, **minutes: float) -> None:
    """Times of the job, so many minutes ago."""
    with database.write() as session:
        at = utc_now(session)
        values = {name: at - timedelta(minutes=ago) for name, ago in minutes.items()}
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def test_of_nothing_everything_is_nought(database: Database) -> None:
    now, ended = Watch(database).look()
    assert now.jobs == {"queued": 0, "running": 0, "cancelling": 0}
    assert (now.oldest_queued, now.busy_workers, now.outbox, now.lost_leases) == (0, 0, 0, 0)
    assert now.stored_bytes == {"files": 0, "uploads": 0, "checkpoints": 0}
    assert now.deliveries == {"pending": 0, "failed": 0}
    assert (now.oldest_due, now.oldest_unsigned, now.dispatcher_silent) == (0, 0, None)
    assert {status: sum(one.counts) for status, one in ended.jobs.items()} == dict.fromkeys(ended.jobs, 0)


def test_the_queue_of_all_tenants(database: Database) -> None:
    oldest, *_ = [add_job(database, tenant) for tenant in TENANTS]
    shift(database, oldest, created_at=5)
    add_running(database)
    cancelling = add_running(database)
    with database.write() as session:
        Jobs(session).request_cancel(cancelling.job_id)
        duties.take(session, "release_expired", "someone", 60)
        Outbox(session).settle(oldest)
    now, _ = Watch(database).look()
    assert now.jobs == {"queued": 2, "running": 1, "cancelling": 1}
    assert 300 <= now.oldest_queued < 330
    assert (now.busy_workers, now.outbox, now.dispatcher_silent) == (1, 1, 0)


def test_a_dispatcher_that_fell_silent(database: Database) -> None:
    with database.write() as session:
        duties.take(session, "release_expired", "someone", -90)
    with database.read() as session:
        silent = census.dispatcher_silent(session, utc_now(session))
    assert silent == pytest.approx(90, abs=20)


def test_bytes_that_are_kept(database: Database) -> None:
    add_file(database)  # 10 bytes
    gone = add_file(database)
    held = add_running(database)  # with a file of its own
    with database.write() as session:
        session.execute(update(File).where(File.id == gone).values(deleted_at=utc_now(session)))
        at = utc_now(session) + timedelta(hours=1)
        done, under_way = (
            Upload(
                id=new_id("upload"),
                tenant="default",
                purpose="forget",
                name="n",
                format="jsonl",
                expires_at=at,
            )
            for _ in range(2)
        )
        done.file_id = gone
        session.add_all([done, under_way])
        session.flush()
        for upload in (done, under_way):
            session.add(
                UploadPart(
                    upload_id=upload.id, number=1, tenant="default", name="n", bytes=7, sha256="0" * 64
                )
            )
        session.add(
            Checkpoint(
                id=new_id("ckpt"), tenant="other", job_id=held.job_id, bytes=4 << 40, manifest={"files": []}
            )
        )
    now, _ = Watch(database).look()
    assert now.stored_bytes == {"files": 20, "uploads": 7, "checkpoints": 4 << 40}


def test_deliveries(database: Database) -> None:
    job_id = add_job(database)
    with database.write() as session:
        at = utc_now(session)
        hook = Webhook(
            id=new_id("wh"), tenant="default", url="https://x", description="", events=[], secret="s"
        )
        session.add(hook)
        session.flush()
        for number, (status, due) in enumerate(
            [("pending", -120), ("pending", 600), ("failed", None), ("delivered", None)]
        ):
            message = WebhookMessage(
                id=new_id("msg"),
                tenant="default",
                job_id=job_id,
                seq=100 + number,
                type="job.queued",
                data={},
            )
            session.add(message)
            session.flush()
            session.add(
                WebhookDelivery(
                    id=new_id("dlv"),
                    tenant="default",
                    webhook_id=hook.id,
                    message_id=message.id,
                    status=status,
                    next_attempt_at=None if due is None else at + timedelta(seconds=due),
                )
            )
    now, _ = Watch(database).look()
    assert now.deliveries == {"pending": 2, "failed": 1}
    assert now.oldest_due == pytest.approx(120, abs=20)


def test_audit_rows_that_no_head_covers(database: Database) -> None:
    with database.write() as session:
        for tenant in TENANTS:
            for _ in range(3):
                Audit(session, tenant).record("key_1", "job.create", "job_1")
    assert 0 < Watch(database).look()[0].oldest_unsigned < 20
    with database.write() as session:
        for tenant in TENANTS:
            for seq in (1, 3):
                session.add(AuditHead(tenant=tenant, seq=seq, hash="h", key_id="k", signature="s"))
    assert Watch(database).look()[0].oldest_unsigned == 0
    with database.write() as session:
        Audit(session, "other").record("key_1", "job.create", "job_2")
    assert Watch(database).look()[0].oldest_unsigned > 0


def end(database: Database, minutes_ago: float, seconds: float) -> str:
    """A job that took so long and succeeded so long ago."""
    held = add_running(database)
    held.phase("validating", 1, 1)
    held.phase("unlearning", 1, 2)
    held.phase("unlearning", 2, 2)
    held.succeed()
    shift(database, held.job_id, finished_at=minutes_ago, started_at=minutes_ago + seconds / 60)
    return held.job_id


def test_jobs_that_ended(database: Database) -> None:
    end(database, 30, 700)
    end(database, 1, 2)
    failed = add_running(database)
    failed.fail("ENGINE_CRASHED", "It crashed.", None)
    with database.write() as session:
        Jobs(session).request_cancel(add_job(database))
    watch = Watch(database)
    for _ in range(2):  # the second look reads the settled job no more, and says the same
        _, ended = watch.look()
        assert {name: sum(one.counts) for name, one in ended.jobs.items() if sum(one.counts)} == {
            "succeeded": 2,
            "failed": 1,
            "cancelled": 1,
        }
        took = ended.jobs["succeeded"]
        assert took.total == pytest.approx(702)
        assert [bound for bound, count in zip(BOUNDS, took.counts, strict=False) if count] == [2.5, 900]
        assert ended.jobs["cancelled"].total == 0
        assert ended.phases.keys() == {"queued", "starting", "validating", "unlearning"}
        assert all(sum(one.counts) == 2 for one in ended.phases.values())
        assert (ended.attempts, ended.lost_leases) == (3, 0)


def test_phases_have_their_seconds(database: Database) -> None:
    seconds = get_job(database, end(database, 0, 0)).phase_seconds
    assert seconds is not None
    assert seconds.keys() == {"queued", "starting", "validating", "unlearning"}
    assert all(0 <= value < 20 for value in seconds.values())


def test_a_later_look_reads_only_what_ended_lately(database: Database) -> None:
    for _ in range(5):
        end(database, 60, 10)
    watch, statements = Watch(database), []
    watch.look()

    @event.listens_for(database.engine, "before_cursor_execute")
    def _seen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    end(database, 60, 10)  # committed an hour after the time it carries: more than a look waits for
    end(database, 2, 10)
    statements.clear()
    assert sum(watch.look()[1].jobs["succeeded"].counts) == 5 + 1
    # Of the columns of jobs, only rows past the settled ones.
    (of_jobs,) = (one for one in statements[-1:] if "phase_seconds" in one)
    assert "finished_at >=" in of_jobs
    assert sum(Watch(database).look()[1].jobs["succeeded"].counts) == 7


def test_lost_leases_are_counted_before_and_after_the_end(database: Database) -> None:
    held = add_running(database, lease_seconds=-1)
    with database.write() as session:
        leases.release_expired(session, 3)
    watch = Watch(database)
    now, ended = watch.look()
    assert (now.lost_leases, ended.lost_leases) == (1, 0)
    with database.write() as session:
        Jobs(session).request_cancel(held.job_id)
    now, ended = watch.look()
    assert (now.lost_leases, ended.lost_leases) == (0, 1)


def test_buckets() -> None:
    durations = Durations()
    for seconds in (0, 0.5, 0.51, 86_400, 90_000):
        durations.add(seconds)
    rows = dict(census.cumulative(durations))
    assert (rows["0.5"], rows["1"], rows["43200"], rows["86400"], rows["+Inf"]) == (2, 3, 3, 4, 5)
    assert durations.total == pytest.approx(176_401.01)
