"""Every command and health check of docker-compose.yml, started as it stands against real services.

Only what Docker would provide is replaced: the names of the other containers become ports of this machine,
and the folder /data a temporary one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.house.images import compose, stages
from tests.services import free_port

START_SECONDS = 60  # of one program, on a busy machine
STOP_SECONDS = 20
BIN = Path(sys.executable).parent


class Host:
    """Stands for the Docker host: fills in the compose file and starts its services as processes."""

    def __init__(self, folder: Path, postgres_server: str) -> None:
        self.folder = folder
        self.api_port, self.redis_port = free_port(), free_port()
        self.postgres_port = postgres_server.rsplit(":", 1)[1]
        (folder / "models").mkdir()
        self.services: dict[str, Any] = compose(
            {
                "POSTGRES_PASSWORD": "postgres-password",
                "REDIS_PASSWORD": "redis-password",
                "SEUF_SECRET": "a secret of this test, long enough for anybody",
                "SEUF_MODELS": str(folder / "models"),
            }
        )["services"]

    def here(self, text: str) -> str:
        """`text` with the addresses of containers replaced by those of this machine."""
        redis = f"exec redis-server --port {self.redis_port} --bind 127.0.0.1 --dir {self.folder}"
        for container, machine in {
            "@postgres:5432": f"@127.0.0.1:{self.postgres_port}",
            "@redis:6379": f"@127.0.0.1:{self.redis_port}",
            "127.0.0.1:8321": f"127.0.0.1:{self.api_port}",
            "exec redis-server": redis,
            "redis-cli": f"redis-cli -p {self.redis_port}",
        }.items():
            text = text.replace(container, machine)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """What the container would see: the variables of the service, and where programs are."""
        given = {key: self.here(value) for key, value in self.services[name].get("environment", {}).items()}
        given |= {"SEUF_DATA_DIR": str(self.folder), "SEUF_MODEL_ROOTS": str(self.folder / "models")}
        return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(self.folder), **given}

    def command(self, parts: list[str]) -> list[str]:
        """A command list of the file, for this machine."""
        port = {"8321": str(self.api_port), "0.0.0.0": "127.0.0.1"}
        return [port.get(part, self.here(part)) for part in parts]

    @contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """The service as a process, stopped at the end as Docker stops it."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(self.services[name]["command"]),
                env=self.environment(name),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
            assert process.poll() is None, f"{name} ended by itself\n{self.log(name)}"
            process.terminate()
            # -SIGTERM is a program that leaves SIGTERM to the system, as Redis's shell does before its exec.
            assert process.wait(STOP_SECONDS) in (0, -signal.SIGTERM), self.log(name)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def log(self, name: str) -> str:
        """What the service has printed so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def becomes_healthy(self, name: str, check: list[str]) -> None:
        """Run the health check until it passes, as Docker does."""
        kind, *rest = check
        command = ["sh", "-c", *rest] if kind == "CMD-SHELL" else rest
        end = time.monotonic() + START_SECONDS
        while True:
            result = subprocess.run(
                self.command(command),
                env=self.environment(name),
                cwd=self.folder,
                capture_output=True,
                text=True,
            )
            if result.returncode == 0:
                return
            if time.monotonic() > end:
                pytest.fail(f"{name}: {command} fails: {result.stderr}\n{self.log(name)}")
            time.sleep(0.2)


@pytest.fixture
def host(tmp_path: Path, postgres_server: str) -> Iterator[Host]:
    """A host with the role and the database that the postgres container makes from its variables."""
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute("CREATE ROLE seuf LOGIN")
        connection.execute("CREATE DATABASE seuf OWNER seuf")
    yield Host(tmp_path, postgres_server)
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute("DROP DATABASE seuf WITH (FORCE)")
        connection.execute("DROP ROLE seuf")


def image_check(stage: str) -> list[str]:
    """The HEALTHCHECK of an image, in the form of compose."""
    (text,) = stages()[stage].all("HEALTHCHECK")
    parts: list[str] = ["CMD", *json.loads(text.split(" CMD ", 1)[1])]
    return parts


def answers(host: Host, key: str) -> int:
    """The status of a request with this key."""
    url = f"http://127.0.0.1:{host.api_port}/jobs"
    return httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code


def test_every_command_runs(host: Host) -> None:
    services = host.services
    ready = [
        *services["postgres"]["healthcheck"]["test"],
        "--host",
        "127.0.0.1",
        "--port",
        host.postgres_port,
    ]
    subprocess.run(ready[1:], check=True)

    with host.running("redis"):
        host.becomes_healthy("redis", services["redis"]["healthcheck"]["test"])
        migrate = subprocess.run(
            host.command(services["migrate"]["command"]), env=host.environment("migrate"), cwd=host.folder
        )
        assert migrate.returncode == 0

        with host.running("api"), host.running("dispatcher"), host.running("worker-cpu"):
            host.becomes_healthy("api", image_check("api"))
            host.becomes_healthy("api", services["api"]["healthcheck"]["test"])
            host.becomes_healthy("worker-cpu", image_check("worker"))
            # `docker compose exec api seuf keys create`: the first key of a new service.
            key = subprocess.check_output(
                ["seuf", "keys", "create", "--name", "first"], env=host.environment("api"), text=True
            )
            assert answers(host, key.splitlines()[-1]) == 200
            assert answers(host, "seuf_wrong") == 401

    with socket.socket() as free:  # everything is down again
        assert free.connect_ex(("127.0.0.1", host.api_port)) != 0
