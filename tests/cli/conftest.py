"""A real `seuf up` for the tests of the command, with a home folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import tiny_model
from tests.shell import Shell, stop, write_sets

__all__ = ["tiny_model"]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A home without a service."""
    shell = Shell(tmp_path)
    yield shell
    shell.clean_up()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Shell]:
    """A home with a running service (without a worker: its jobs stay queued) and with sets to submit."""
    shell = Shell(tmp_path_factory.mktemp("home"))
    write_sets(shell.home)
    (shell.home / "tiny").symlink_to(tiny_model)
    process = shell.start("--no-worker", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["key"].startswith("seuf_")
    yield shell
    assert "Traceback" not in stop(process)
    assert process.returncode == 0
