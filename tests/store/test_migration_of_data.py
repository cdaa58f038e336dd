"""A database in use is upgraded and brought back: nothing is lost, and everything means what it meant."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, insert, inspect, select, update

from store import migrate
from store.audit import START, Audit, hash_of
from store.checkpoints import Checkpoints
from store.database import Database
from store.events import Events
from store.files import Files
from store.ids import new_id
from store.jobs import Jobs
from store.keys import Keys, authenticate
from store.models import Models
from store.outbox import Outbox
from store.results import Results
from store.tables import AuditRow
from store.tables import File as FileRow
from store.transitions import Status

SECRET = b"of these tests"
AT = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
TENANTS = ("default", "other")
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture
def database(empty_database_url: str) -> Iterator[Database]:
    """At the first schema, with rows of two tenants in every table."""
    migrate.upgrade(empty_database_url, "0001")
    opened = Database(empty_database_url)
    _fill(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, tuple[str, str, str]]:
    """Tenant -> API key, its prefix and its HMAC, which have not changed since the first schema."""
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    migrate.upgrade(url)
    made = Database(url)
    with made.write() as session:
        keys = {tenant: Keys(session, tenant).create("old", SECRET) for tenant in TENANTS}
        return {tenant: (key.token, key.row.prefix, key.row.hmac) for tenant, key in keys.items()}


def test_up_keeps_every_value(database: Database) -> None:
    before = _everything(database)
    migrate.upgrade(_url(database))
    assert _shared(_everything(database), before) == before


def test_what_was_there_means_the_same(database: Database, tokens: dict[str, tuple[str, str, str]]) -> None:
    _give_keys(database, tokens)
    migrate.upgrade(_url(database))
    for tenant in TENANTS:
        with database.read() as session:
            key = authenticate(session, tokens[tenant][0], SECRET)
            assert key is not None
            assert (key.tenant, key.scopes, key.expires_at) == (tenant, ["admin"], None)
            (file,) = Files(session, tenant).list().data
            assert (file.format, file.uploaded_sha256, file.uploaded_bytes) == ("jsonl", file.sha256, 48)
            assert file.deleted_at is None
            jobs = {job.status: job for job in Jobs(session, tenant).list().data}
            assert jobs.keys() == {Status.QUEUED, Status.SUCCEEDED}
            done = jobs[Status.SUCCEEDED]
            assert (done.lost_leases, done.retry_of, done.max_seconds) == (0, None, None)
            assert done.started_at == AT
            assert [event.seq for event in Events(session, tenant).list(done.id)] == [1, 2]
            assert Models(session, tenant).get(done.model_id).facts == {"num_experts": 8}
            results = Results(session, tenant)
            assert results.attribution(done.id).matrix == [[0.5, None]]  # type: ignore[union-attr]
            assert [row.expert for row in results.selection(done.id)] == [3]
            assert [row.value for row in results.metrics(done.id)] == [0.25]
            assert Checkpoints(session, tenant).get(str(done.checkpoint_id)).manifest == {"files": []}
    with database.read() as session:
        assert len(Outbox(session).pending()) == len(TENANTS)


def test_the_audit_rows_are_chained_and_the_chain_goes_on(database: Database) -> None:
    migrate.upgrade(_url(database))
    for tenant in TENANTS:
        with database.write() as session:
            Audit(session, tenant).record("key_new", "job.create", "job_new", "req_1")
        with database.read() as session:
            _check_chain(list(session.scalars(_audit_of(tenant))), 4)


def test_down_keeps_the_values_of_the_first_schema(database: Database) -> None:
    before, shape = _everything(database), _shape(database)
    migrate.upgrade(_url(database))
    migrate.downgrade(_url(database), "0001")
    assert _everything(database) == before
    assert _shape(database) == shape


def test_down_and_up_again_is_the_same_as_up(database: Database) -> None:
    migrate.upgrade(_url(database))
    once = _everything(database)
    migrate.downgrade(_url(database), "0001")
    migrate.upgrade(_url(database))
    assert _everything(database) == once


def test_down_takes_the_rows_of_deleted_files(database: Database) -> None:
    """The first schema has no way to say that one is deleted: it would come back to life."""
    migrate.upgrade(_url(database))
    with database.write() as session:
        gone = Files(session, "other").list().data[0].id
        session.execute(update(FileRow).where(FileRow.id == gone).values(deleted_at=AT))
    migrate.downgrade(_url(database), "0001")
    assert [row["tenant"] for row in _everything(database)["files"]] == ["default"]


def _check_chain(rows: list[AuditRow], length: int) -> None:
    assert [row.seq for row in rows] == list(range(1, length + 1))
    previous = START
    for row in rows:
        assert row.previous_hash == previous
        assert row.hash == hash_of(row)
        previous = row.hash


def _audit_of(tenant: str) -> Any:
    return select(AuditRow).where(AuditRow.tenant == tenant).order_by(AuditRow.seq)


def _url(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


def _tables(database: Database) -> MetaData:
    found = MetaData()
    found.reflect(database.writing_engine)
    found.remove(found.tables["alembic_version"])
    return found


def _shape(database: Database) -> dict[str, Any]:
    """Columns, indexes, rules and references of every table."""
    looked = inspect(database.writing_engine)
    return {
        name: (
            {
                column["name"]: (str(column["type"]), column["nullable"])
                for column in looked.get_columns(name)
            },
            sorted((index["name"], index["column_names"]) for index in looked.get_indexes(name)),
            sorted((rule["name"], rule["column_names"]) for rule in looked.get_unique_constraints(name)),
            sorted((key["name"], key["referred_table"]) for key in looked.get_foreign_keys(name)),
        )
        for name in looked.get_table_names()
    }


def _everything(database: Database) -> Rows:
    """Every row of every table that is there now, read without the classes of the newest schema."""
    with database.read() as session:
        return {
            table.name: sorted((dict(row) for row in session.execute(select(table)).mappings()), key=str)
            for table in _tables(database).sorted_tables
        }


def _shared(rows: Rows, like: Rows) -> Rows:
    """The tables and columns that `like` has too."""
    return {
        name: sorted(({key: row[key] for key in wanted[0]} for row in rows[name]), key=str)
        for name, wanted in like.items()
    }


def _give_keys(database: Database, tokens: dict[str, tuple[str, str, str]]) -> None:
    keys = _tables(database).tables["api_keys"]
    with database.write() as session:
        for tenant, (_, prefix, digest) in tokens.items():
            values = {"prefix": prefix, "hmac": digest}
            session.execute(update(keys).where(keys.c.tenant == tenant).values(values))


def _fill(database: Database) -> None:
    tables = _tables(database)
    with database.write() as session:
        # Rows of one tenant among those of the other, as in life.
        for turn in range(3):
            for tenant in TENANTS:
                session.execute(insert(tables.tables["audit"]), [_audit_row(database, tenant, turn)])
        for tenant in TENANTS:
            rows = _rows(database, tenant)
            assert rows.keys() | {"audit"} == tables.tables.keys()
            for table in tables.sorted_tables:
                if table.name in rows:
                    session.execute(insert(table), rows[table.name])


def _time(database: Database, seconds: float = 0) -> datetime:
    at = AT + timedelta(seconds=seconds)
    return at.replace(tzinfo=None) if database.is_sqlite else at


def _audit_row(database: Database, tenant: str, turn: int) -> dict[str, Any]:
    acts = (("file.create", "file_1"), ("job.create", "job_1"), ("file.delete", "file_é"))
    what, on = acts[turn]
    return {"tenant": tenant, "who": "key_1", "what": what, "object": on, "at": _time(database, turn)}


def _rows(database: Database, tenant: str) -> Rows:
    """A queued job and one that succeeded, with everything that belongs to them."""
    model, file, done, waiting, ckpt = (new_id(kind) for kind in ("model", "file", "job", "job", "ckpt"))
    at, owned = _time(database), {"tenant": tenant}
    listed = {**owned, "created_at": at}
    key = {"name": "old", "prefix": f"seuf_{tenant}", "hmac": "0" * 64, "revoked_at": None}
    size = {"sha256": "1" * 64, "bytes": 48, "examples": 2, "tokens_estimate": 9}
    of_done = {**owned, "job_id": done}
    scores = {"score": "contrast", "matrix": [[0.5, None]], "layers": [1], "stability": {}, "coverage": 0.5}
    return {
        "api_keys": [{**listed, "id": new_id("key"), **key}],
        "files": [{**listed, "id": file, "purpose": "forget", "name": "ä.jsonl", **size}],
        "models": [
            {**listed, "id": model, "name": "m", "path": "/m", "digest": "d", "facts": {"num_experts": 8}}
        ],
        "jobs": [
            _job(listed, waiting, model, file, "queued"),
            {**_job(listed, done, model, file, "succeeded"), "checkpoint_id": ckpt, "started_at": at},
        ],
        "events": [
            {**of_done, "seq": seq, "type": "step", "data": {"step": seq}, "at": at} for seq in (1, 2)
        ],
        "attributions": [{**of_done, **scores}],
        "selected_experts": [{**of_done, "layer": 1, "expert": 3, "rank": 0, "score": 0.5}],
        "metrics": [
            {
                **of_done,
                "stage": "after",
                "set": "forget",
                "domain": "",
                "name": "choice",
                "value": 0.25,
                "n": 4,
            }
        ],
        "checkpoints": [{**listed, "id": ckpt, "job_id": done, "bytes": 7, "manifest": {"files": []}}],
        "outbox": [{**listed, "job_id": waiting}],
    }


def _job(listed: dict[str, Any], job: str, model: str, file: str, status: str) -> dict[str, Any]:
    ended = status != "queued"
    return {
        **listed,
        **{"id": job, "status": status, "model_id": model, "forget_file": file, "forget_sha256": "1" * 64},
        **{"method": {"steps": 3}, "seed": 7, "metadata": {"ticket": "ü"}, "phase_done": 0, "phase_total": 0},
        **{"cancel_requested": False, "attempts": int(ended), "lease_token": int(ended)},
        **{"event_seq": 2 * ended, "checkpoint_id": None, "started_at": None},
    }
