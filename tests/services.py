"""Real services for tests: a private Postgres, Redis and S3 server, as processes of their own on free ports.

Each is started when the first test of a session asks for it and stopped with the session. `database` gives
a fresh, migrated database per test, once on SQLite and once on Postgres.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from store import migrate
from store.database import Database
from store.ids import random_base32
from store.tables import Base

START_SECONDS = 30
S3_KEY_ID, S3_SECRET = "the-key-of-the-tests", "the secret key of the tests, which no log may have"
_numbers = count()


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Look 50 times a second until `true()`; fail the test after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"Waited {seconds} s for {what}.")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Address of a private Postgres without a database name, e.g. postgresql://postgres@127.0.0.1:5433."""
    folder = Path(tempfile.mkdtemp(prefix="seuf-postgres-"))
    as_user = _unprivileged(folder)
    data, port = folder / "data", free_port()
    initdb = [
        _postgres_binary("initdb"),
        "-D",
        str(data),
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "-N",
    ]
    subprocess.run([*as_user, *initdb], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    # Durability is not under test; without fsync a database per test costs milliseconds.
    fast = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
    where = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    command = [*as_user, _postgres_binary("postgres"), *where, *fast]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    url = f"postgresql://postgres@127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(url), START_SECONDS, f"Postgres; see {folder / 'log'}")
        yield url
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_migrated(postgres_server: str) -> Iterator[str]:
    """Address of one migrated database that tests use in turn, emptied between them.

    (A database per test, copied from a template, costs .3 s each: Postgres checkpoints when it drops one.)
    """
    with _postgres_database(postgres_server, "template0") as url:
        migrate.upgrade(url)
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that tests copy."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a fresh database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    with _postgres_database(request.getfixturevalue("postgres_server"), "template0") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a fresh migrated database."""
    if request.param == "sqlite":
        path = tmp_path / "seuf.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    yield request.getfixturevalue("postgres_url")


@pytest.fixture
def postgres_url(postgres_migrated: str) -> Iterator[str]:
    """Address of the migrated Postgres database, empty again after the test."""
    yield postgres_migrated
    _empty(postgres_migrated)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh migrated database."""
    opened = Database(database_url)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """Address of a private Redis that keeps nothing on disk."""
    with redis_on(free_port()) as url:
        yield url


@contextmanager
def redis_on(port: int) -> Iterator[str]:
    """A Redis of its own on `port` for the length of the block; yields its address."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.fail("These tests need Redis. Install it: apt-get install redis-server")
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([*_dies_with_us(), *command], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        wait_until(lambda: _redis_answers(url), START_SECONDS, "Redis")
        yield url
    finally:
        _stop(process)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Address of an empty Redis."""
    redis.Redis.from_url(redis_server).flushall()
    return redis_server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a private S3 server that checks who asks."""
    with s3_on(free_port()) as url:
        yield url


@contextmanager
def s3_on(port: int) -> Iterator[str]:
    """An S3 server of its own on `port` for the length of the block; yields its address."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen([*_dies_with_us(), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _s3_answers(url), START_SECONDS, "the S3 server")
        yield url
    finally:
        _stop(process)


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own on it, e.g. s3://test-3/seuf, with credentials and address in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("SEUF_S3_ENDPOINT_URL", s3_server)
    name = f"test-{next(_numbers)}-{random_base32(6)}"
    httpx.put(f"{s3_server}/{name}").raise_for_status()
    return f"s3://{name}/seuf"


def _s3_answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code < 500  # 403 without a key
    except httpx.TransportError:
        return False


def _empty(url: str) -> None:
    """Back to how the migrations left it, whatever is still connected."""
    tables = ", ".join(Base.metadata.tables)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY".encode())


class _postgres_database:
    """A copy of a template, dropped again with whatever is still connected to it."""

    def __init__(self, server: str, template: str) -> None:
        self.server, self.template = server, template
        self.name = f"test_{next(_numbers)}_{random_base32(6)}"

    def __enter__(self) -> str:
        _administer(self.server, f"CREATE DATABASE {self.name} TEMPLATE {self.template}")
        return f"{self.server}/{self.name}"

    def __exit__(self, *_: object) -> None:
        _administer(self.server, f"DROP DATABASE {self.name} WITH (FORCE)")


def _administer(server: str, statement: str) -> None:
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(statement.encode())


def _answers(server: str) -> bool:
    try:
        _administer(server, "SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def _redis_answers(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.ConnectionError:
        return False


def _postgres_binary(name: str) -> str:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    for folder in reversed(folders):
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"These tests need Postgres ({name}). Install it: apt-get install postgresql")
    return found


def _unprivileged(folder: Path) -> list[str]:
    """The command prefix that runs a process as somebody who is not root (Postgres refuses root), dying
    with us.
    """
    if os.geteuid() != 0:
        return _dies_with_us()
    user = "postgres"
    shutil.chown(folder, user)
    return [*_dies_with_us(), f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def _dies_with_us() -> list[str]:
    """`setpriv` stops the service even when pytest itself is killed. Not there outside Linux."""
    return ["setpriv", "--pdeathsig=INT"] if sys.platform == "linux" else []


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGINT is a fast, clean shutdown of Postgres and of Redis."""
    process.send_signal(2)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
