"""Migrations: they run, once, from anywhere, on both databases. (As a history: test_migration_history.)"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import inspect

from migrations.__main__ import main
from store import migrate
from store.database import Database
from store.tables import Base


def test_up_and_down(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    assert not migrate.at_head(database)
    migrate.upgrade(empty_database_url)
    assert migrate.at_head(database)
    assert set(inspect(database.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    migrate.downgrade(empty_database_url, "base")
    assert not migrate.at_head(database)
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    migrate.upgrade(empty_database_url)
    assert migrate.at_head(database)
    database.dispose()


def test_two_that_start_together_both_succeed(empty_database_url: str) -> None:
    """Two processes, since alembic's own state is per process."""
    environment = os.environ | {"SEUF_DATABASE_URL": empty_database_url}
    command = [sys.executable, "-m", "migrations", "upgrade"]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(lambda process: process.communicate(timeout=60)[1], processes))
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    database = Database(empty_database_url)
    assert migrate.at_head(database)
    database.dispose()


def test_the_command(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEUF_DATABASE_URL", empty_database_url)
    assert main(["check"]) == 1
    assert "python -m migrations upgrade" in capsys.readouterr().err
    assert main(["upgrade"]) == 0
    assert main(["check"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["downgrade"])
    assert main(["downgrade", "base"]) == 0
    assert main(["check"]) == 1


def test_runs_from_any_folder(tmp_path: Path) -> None:
    """The package is found where it is installed, not in the working folder."""
    root = str(Path(migrate.__file__).parents[1])
    environment = os.environ | {"SEUF_DATA_DIR": str(tmp_path / "new"), "PYTHONPATH": root}
    subprocess.run(
        [sys.executable, "-m", "migrations", "upgrade"], env=environment, cwd=tmp_path, check=True, timeout=60
    )
    assert migrate.at_head(Database(f"sqlite:///{tmp_path / 'new' / 'seuf.db'}"))
