"""The real API on a real socket for tests: uvicorn in a thread, once a session per kind of database.

Each test is a tenant of its own with its own key, so that tests share a server without seeing each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.settings import ApiSettings
from seuf_core.checkpoint.manifest import (
    BaseRef,
    ChangedTensor,
    FileEntry,
    Manifest,
    sha256_file,
)
from store import leases, migrate
from store.artefacts import Artefacts
from store.database import Database
from store.fenced import AttributionResult, FencedJob, Measurement, Selected
from store.ids import new_id, random_base32
from store.keys import Keys
from tests.services import wait_until

SECRET = b"the secret of the tests, long enough for anybody"


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Run `app` on a free port of the loopback interface; yields its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, 20, "uvicorn")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@dataclass(frozen=True)
class Served:
    """A running API and its parts."""

    url: str
    settings: ApiSettings
    database: Database

    @property
    def artefacts(self) -> Artefacts:
        """Where its files lie."""
        return Artefacts.of(self.settings)


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The API on a migrated database, for the whole session."""
    yield from _serve_on(request.param, request, tmp_path_factory)


@pytest.fixture(scope="session")
def served_on_sqlite(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The same on SQLite only, for folders of tests that do not care."""
    yield from _serve_on("sqlite", request, tmp_path_factory)


def _serve_on(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    if kind == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        path = folder / "seuf.db"
        path.write_bytes(template.read_bytes())
        url = f"sqlite:///{path}"
    else:
        server = request.getfixturevalue("postgres_server")
        # pytest makes a session fixture again each time its parameter changes, on the same server.
        name = f"served_{random_base32(6)}"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        url = f"{server}/{name}"
        migrate.upgrade(url)
    settings = ApiSettings(
        data_dir=folder, database_url=url, secret=SECRET.decode(), max_upload_bytes=2 << 20
    )
    database = Database(url)
    with serve(create_app(settings)) as address:
        yield Served(address, settings, database)
    database.dispose()


# For what does not reach the database, or does not depend on which it is: once is enough.
on_sqlite = pytest.mark.parametrize("served", ["sqlite"], indirect=True)


@dataclass(frozen=True)
class Tenant:
    """One test's own view of a running API."""

    served: Served
    name: str
    key: str
    http: httpx.Client

    def upload(self, purpose: str, lines: Sequence[str] | None = None) -> dict[str, Any]:
        """A small set, uploaded."""
        content = "\n".join(lines if lines is not None else lines_of(purpose)).encode()
        answer = self.http.post("/files", data={"purpose": purpose}, files={"file": ("set.jsonl", content)})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def register(self, path: Path, name: str = "tiny") -> dict[str, Any]:
        """A registered model."""
        answer = self.http.post("/models", json={"name": name, "path": str(path)})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def submit(self, path: Path, **fields: Any) -> dict[str, Any]:
        """A job on uploaded sets; registers `path` as "tiny" if this tenant has no such model."""
        if self.http.get("/models/tiny").status_code == 404:
            self.register(path)
        sets = {f"{p}_set": {"file": self.upload(p)["id"]} for p in ("forget", "retain")}
        answer = self.http.post("/jobs", json={"model": "tiny", **sets, **fields})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def run(self, job_id: str) -> FencedJob:
        """Claim the job as a worker does."""
        with self.served.database.write() as session:
            claim = leases.claim(session, job_id, "test-worker", 60)
        assert claim is not None
        return FencedJob(self.served.database, job_id, claim.token)


@pytest.fixture
def tenant(served: Served) -> Iterator[Tenant]:
    """A fresh tenant with a key, and an HTTP client that carries it."""
    name = new_id("tenant")
    with served.database.write() as session:
        key = Keys(session, name).create("test", SECRET).token
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as http:
        yield Tenant(served, name, key, http)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMoE checkpoint."""
    from tests.tiny import write_model  # imports torch: only for tests that need a model

    return write_model(tmp_path_factory.mktemp("model") / "olmoe", "olmoe")


def lines_of(purpose: str, number: int = 3) -> list[str]:
    """Valid lines of a set."""
    if purpose == "evaluation":
        tail = '"choices": ["Ada", "Bo"], "answer": 0, "set": "forget"}'
        return [f'{{"id": "p{n}", "prompt": "Who is {n}?", {tail}' for n in range(number)]
    return [
        f'{{"id": "{purpose}-{n}", "prompt": "Who lives at {n} Elm Road?", "completion": " Ada {n}."}}'
        for n in range(number)
    ]


def finish(served: Served, held: FencedJob, folder: Path, content: dict[str, bytes]) -> str:
    """End a claimed job as a worker does: results, checkpoint folder, success. Returns its id."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    entries = tuple(
        FileEntry(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.iterdir())
    )
    manifest = Manifest(
        created_by="tests",
        base=BaseRef(digest="sha256:" + "0" * 64, model_type="olmoe"),
        files=entries,
        changed=(ChangedTensor(tensor="w", shard=entries[0].name, bytes=4),),
        parameters_changed=1,
        parameters_total=100,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    held.attribution(AttributionResult("contrast", [[0.1, 0.4], [0.3, 0.2]], [0, 2], {"overlap": 0.9}, 0.8))
    held.selection([Selected(0, 1, 0.4)])
    held.metrics([Measurement("before", "forget", "", "choice", 0.9, 10, 0.25)])
    checkpoint = new_id("ckpt")
    size = sum(entry.bytes for entry in entries)
    served.artefacts.put_folder(folder, f"checkpoints/{checkpoint}")
    with held.together():
        held.publish_checkpoint(checkpoint, size, manifest.model_dump(mode="json"))
        held.succeed()
    return checkpoint
