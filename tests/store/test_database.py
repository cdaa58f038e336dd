"""The two kinds of transaction, on both databases."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

import store.database
from store.database import AWAY, Database, utc_now
from store.models import Models
from store.outbox import Outbox
from store.tables import Base, Event, Job, Model
from tests.seeds import add_job, add_model, get_job


def test_write_commits_and_a_raising_block_does_not(database: Database) -> None:
    kept = add_model(database)
    with pytest.raises(RuntimeError, match="no"), database.write() as session:  # noqa: PT012
        Models(session).create("lost", "/p", "d", {})
        raise RuntimeError("no")
    with database.read() as session:
        assert [model.id for model in session.scalars(select(Model))] == [kept]


def test_the_database_refuses_a_write_in_a_read(database: Database) -> None:
    kept = add_model(database)
    for statement in ("DELETE FROM models", f"UPDATE models SET name = 'x' WHERE id = '{kept}'"):
        with pytest.raises(DBAPIError, match=r"read-only|readonly"), database.read() as session:
            session.execute(text(statement))
    with pytest.raises(DBAPIError, match=r"read-only|readonly"), database.read() as session:
        Outbox(session).settle("job_1")
    with database.read() as session:
        assert [model.id for model in session.scalars(select(Model))] == [kept]


def test_a_connection_that_lay_idle_and_was_cut_is_replaced(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Postgres was restarted: nobody's request fails for it."""
    add_model(database)
    with database.read() as session:
        session.execute(select(Model))
    monkeypatch.setattr("store.database.IDLE_SECONDS", 0)
    if not database.is_sqlite:
        with database.write() as session:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            session.execute(text(f"{others} WHERE datname = current_database() AND pid <> pg_backend_pid()"))
    with database.read() as session:
        assert len(session.scalars(select(Model)).all()) == 1


def test_rows_stay_usable_after_their_transaction(database: Database) -> None:
    job = get_job(database, add_job(database))
    assert job.status == "queued"
    assert job.created_at.tzinfo is UTC
    assert abs(job.created_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_times_come_back_in_utc_and_naive_ones_are_refused(database: Database) -> None:
    model_id = add_model(database)
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    with database.write() as session:
        session.get_one(Model, model_id).created_at = moment
    with database.read() as session:
        back = session.get_one(Model, model_id).created_at
        assert back == moment
        assert back.utcoffset() == timedelta(0)
    with pytest.raises(StatementError, match="without a zone"), database.write() as session:
        session.get_one(Model, model_id).created_at = datetime(2026, 1, 2)


def test_the_clock_moves_inside_a_transaction(database: Database) -> None:
    with database.read() as session:
        first, second = utc_now(session), utc_now(session)
        assert first < second
        assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(Event(job_id="job_nobody", seq=1, tenant="default", type="x", data={}))


def test_writers_that_read_first_take_turns(database: Database) -> None:
    """The SQLite trap: read, then write, in two transactions at once.

    BEGIN IMMEDIATE makes the second one wait.
    """
    job_id = add_job(database)
    barrier, failures = threading.Barrier(4), []

    def raise_by_25() -> None:
        barrier.wait()
        for _ in range(25):
            try:
                with database.write() as session:
                    row = session.execute(
                        text("SELECT attempts FROM jobs WHERE id = :id" + _lock(database)), {"id": job_id}
                    ).one()
                    session.execute(
                        text("UPDATE jobs SET attempts = :n WHERE id = :id"), {"n": row[0] + 1, "id": job_id}
                    )
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=raise_by_25) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert get_job(database, job_id).attempts == 100


def _lock(database: Database) -> str:
    return "" if database.is_sqlite else " FOR UPDATE"


def test_sqlite_is_set_up(database: Database) -> None:
    if not database.is_sqlite:
        with database.read() as session:
            assert session.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
        return
    with database.read() as session:
        settings = {
            name: session.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 30_000}


def test_postgres_ends_a_transaction_that_stands_still(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a worker that is stopped in the middle of one would hold its job for as long as it stands still."""
    monkeypatch.setattr(store.database, "STANDSTILL_SECONDS", 1)
    still, other = Database(postgres_url), Database(postgres_url)
    job_id = add_job(still)
    session = still._write()
    session.execute(update(Job).where(Job.id == job_id).values(step=1))
    with other.write() as writing:  # waits for the row until its holder is ended
        writing.execute(update(Job).where(Job.id == job_id).values(step=2))
    with pytest.raises(AWAY):
        session.commit()
    session.close()
    assert get_job(other, job_id).step == 2
    for database in (still, other):
        database.dispose()


def test_every_table_has_a_tenant(database: Database) -> None:
    of_all = {"duties", "tenants"}  # work of the service itself, and the tenants
    for table in Base.metadata.tables.keys() - of_all:
        columns = {column["name"]: column for column in inspect(database.engine).get_columns(table)}
        assert columns["tenant"]["nullable"] is False, table
