"""No process works on a database that has not the tables of its version."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from store import migrate
from store.database import Database
from store.errors import SchemaMismatchError
from tests.services import free_port
from tests.worker.conftest import House

Make = Callable[..., House]
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def started(house: House, *command: str, **settings: str) -> tuple[int, str]:
    """Run a process to its end; its exit code and what it says."""
    process = house.start(*command, stderr=subprocess.PIPE, **settings)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


def test_a_database_at_head_is_taken(database: Database) -> None:
    migrate.require_head(database)


def test_a_database_that_is_behind_or_ahead_is_told_with_the_way_out(database: Database) -> None:
    def set_revision(revision: str) -> None:
        with database.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})

    with database.read() as session:
        head = session.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    try:
        set_revision("0001")
        with pytest.raises(SchemaMismatchError, match="python -m migrations upgrade") as behind:
            migrate.require_head(database)
        assert "at migration 0001" in behind.value.message
        set_revision("9999")
        with pytest.raises(SchemaMismatchError, match="newer"):
            migrate.require_head(database)
    finally:
        set_revision(head)


@SQLITE
@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "command", [["worker", "--lane", "database"], ["worker.dispatcher"], ["worker", "--lane", "celery"]]
)
def test_workers_and_dispatcher_do_not_start_without_tables(
    make_house: Make, tmp_path: Path, empty_database_url: str, redis_url: str, command: list[str]
) -> None:
    house = make_house("works", database_url=empty_database_url, broker_url=redis_url)
    code, said = started(house, *command)
    assert code == 1
    assert "python -m migrations upgrade" in said
    assert "Traceback" not in said


@SQLITE
def test_the_api_does_not_start_without_tables(make_house: Make, tmp_path: Path) -> None:
    house = make_house("works", database_url=f"sqlite:///{tmp_path / 'empty.db'}")
    port = str(free_port())
    code, said = started(house, "uvicorn", "api.main:app", "--port", port, SEUF_SECRET=secrets.token_hex(32))
    assert code != 0
    assert "python -m migrations upgrade" in said


def test_a_database_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    from store.settings import Settings
    from worker import life

    port = free_port()
    monkeypatch.setattr(life, "AGAIN_SECONDS", 0.1)
    tries: list[float] = []

    def gives_up(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(life.time, "sleep", gives_up)
    with pytest.raises(KeyboardInterrupt):
        life.open_database(Settings(database_url=f"postgresql://nobody@127.0.0.1:{port}/none"))
    assert tries == [0.1] * 3
