"""The programs of one measurement: each a process of its own, all of them gone at its end."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import psutil

from benchmarks.chaos import parts
from benchmarks.chaos.keeper import Keeper, Program, descendants
from client import Client
from store.database import Database

Kind = Literal["sqlite", "postgres"]
KINDS: Final[tuple[Kind, ...]] = ("postgres", "sqlite")
ROOT: Final = Path(__file__).parents[2]
# Limits are counted, as always, and never reached.
UNLIMITED: Final = {name: str(10**12) for name in ("MAX_ACTIVE_JOBS", "MAX_STORED_BYTES", "REQUESTS_PER_MINUTE")}


@dataclass
class Stage:
    """A service on this machine, and room for more programs beside it."""

    folder: Path
    kind: Kind
    environment: dict[str, str]
    keeper: Keeper
    url: str = ""
    key: str = ""

    @property
    def database_url(self) -> str:
        """Of the service."""
        return self.environment["SEUF_DATABASE_URL"]

    def start(self, name: str, command: Sequence[str], **more: str) -> Program:
        """Run `python -m command...` with the service's settings and `more`."""
        environment = {**self.environment, **more}
        return self.keeper.run(Program(name, [sys.executable, "-m", *command], environment, self.folder))

    def serve(self, name: str, app: str, **more: str) -> tuple[Program, str]:
        """Run an ASGI application on a free port, in one process; returns its address too."""
        port = parts.free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--no-access-log"]
        options += ["--timeout-keep-alive", "600"]  # a connection waits while the other side has its turn
        program = self.start(name, ["uvicorn", app, *options], **more)
        parts.wait_for(lambda: _answers(f"http://127.0.0.1:{port}/healthz"), f"{name}; see its log")
        return program, f"http://127.0.0.1:{port}"

    def command(self, *command: str) -> Any:
        """A command of ours that ends by itself; its JSON."""
        run = [sys.executable, "-m", *command]
        done = subprocess.run(run, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in command else None

    def client(self) -> Client:
        """The ordinary client."""
        return Client(self.url, self.key)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.key}"}

    def database(self) -> Database:
        """A look behind the service; the caller disposes of it."""
        return Database(self.database_url)


@contextmanager
def stage(folder: Path, kind: Kind, *, broker: bool = False, **settings: str) -> Iterator[Stage]:
    """A migrated database, a key and an API; with a Redis of its own if `broker`.

    settings: of the service, without their SEUF_.
    """
    folder.mkdir(parents=True)
    keeper = Keeper(secrets.token_hex(8))
    try:
        given = {"DATA_DIR": f"{folder}/data", "SECRET": secrets.token_hex(32), **UNLIMITED}
        given["DATABASE_URL"] = _postgres(folder, keeper) if kind == "postgres" else f"sqlite:///{folder}/data/seuf.db"
        given |= {"BROKER_URL": _redis(folder, keeper), "LANE": "celery"} if broker else {"LANE": "database"}
        made = Stage(folder, kind, _environment(given | settings), keeper)
        made.command("migrations", "upgrade")
        made.key = made.command("cli.main", "keys", "create", "--name", "benchmark", "--json")["key"]
        _, made.url = made.serve("api", "api.main:app")
        yield made
    finally:
        keeper.stop_all()


def memory(program: Program) -> int:
    """Anonymous memory of a program and all that it has started, in bytes."""
    assert program.pid is not None
    infos = (psutil.Process(pid).memory_info() for pid in [program.pid, *descendants(program.pid)])
    return sum(info.rss - info.shared for info in infos)


def open_files(program: Program) -> int:
    """File descriptors of a program's own process: files, sockets, pipes."""
    assert program.pid is not None
    return psutil.Process(program.pid).num_fds()


def _postgres(folder: Path, keeper: Keeper) -> str:
    port = parts.free_port()
    folder.chmod(0o755)  # Postgres runs as a user of its own and must get to its data
    keeper.run(parts.postgres(folder, port))
    parts.wait_for(lambda: parts.postgres_answers(port), "Postgres")
    parts.create_database(port, "seuf")
    return f"postgresql://postgres@127.0.0.1:{port}/seuf"


def _redis(folder: Path, keeper: Keeper) -> str:
    port = parts.free_port()
    keeper.run(parts.redis_server(folder, port))
    parts.wait_for(lambda: parts.redis_answers(port), "Redis")
    return f"redis://127.0.0.1:{port}/0"


def _environment(settings: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEUF_")}
    ours = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return {**clean, **ours, **{f"SEUF_{name}": value for name, value in settings.items()}}


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
