"""What a service stands on: Postgres, Redis, and a disk small enough to be filled."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis

from benchmarks.chaos.keeper import Program

START_SECONDS = 60
MIB = 1 << 20


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(true: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Look until `true()`.

    Raises:
        TimeoutError: after so many seconds, naming `what`.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(0.03)


def postgres(folder: Path, port: int) -> Program:
    """A Postgres that keeps its promises (fsync as it comes), its data under `folder`."""
    # Postgres refuses to run as root, and the folders above must let its user pass.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    home = folder / "postgres"
    home.mkdir()
    if user:
        shutil.chown(home, "postgres", "postgres")
    make = ["-D", f"{home}/data", "-U", "postgres", "-A", "trust", "-E", "UTF8"]
    subprocess.run([*user, _binary("initdb"), *make], check=True, stdout=subprocess.DEVNULL, cwd=home)
    where = ["-D", f"{home}/data", "-h", "127.0.0.1", "-p", str(port), "-k", str(home)]
    program = Program("postgres", [*user, _binary("postgres"), *where], os.environ, folder)
    program.stop_signal = 2  # SIGINT: fast, in order
    return program


def postgres_answers(port: int) -> bool:
    """Does it take connections?"""
    try:
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def redis_server(folder: Path, port: int) -> Program:
    """A Redis that keeps nothing on disk: a restart loses every message, the worst that can happen to it."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("Chaos needs Redis. Install it: make services")
    where = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return Program("redis", [binary, *where], os.environ, folder)


def redis_answers(port: int) -> bool:
    """Does it take commands?"""
    try:
        return bool(redis.Redis(port=port, socket_connect_timeout=2).ping())
    except redis.RedisError:
        return False


def _binary(name: str) -> str:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which(name, path=":".join(map(str, reversed(folders)))) or shutil.which(name)
    if found is None:
        raise SystemExit(f"Chaos needs Postgres ({name}). Install it: make services")
    return found


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """A file system of its own mounted on `folder`, unmounted at the end; False where this machine refuses."""
    folder.mkdir()
    size = f"size={mebibytes}m,mode=0755"
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "seuf-chaos", folder], capture_output=True
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Not one byte left on the disk of `folder` while the block runs."""
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            block = bytes(MIB)
            while block:
                try:
                    file.write(block)
                except OSError:
                    block = block[: len(block) // 2]
        yield
    finally:
        ballast.unlink(missing_ok=True)


def create_database(port: int, name: str) -> None:
    """An empty database."""
    with psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
