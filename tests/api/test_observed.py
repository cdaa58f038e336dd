"""What is told of a request: its id everywhere, one line, and nothing that it carried."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from store import migrate
from tests.services import free_port, wait_until

ROOT = Path(__file__).parents[2]
SECRET = "w9Kx2PqLr7Tz4VbN8mYc3HsD6fGjA1eU"
WRITTEN = "Ottilie"


@dataclass(frozen=True)
class Running:
    """`uvicorn api.main:app`, and what it writes."""

    url: str
    key: str
    log: Path

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        """A request with the key."""
        headers = {"Authorization": f"Bearer {self.key}", **given.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, **given)

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """Of one request, once its last one is there."""

        def found() -> list[dict[str, Any]]:
            told = [json.loads(line) for line in self.log.read_text().splitlines()]
            return [line for line in told if line.get("request_id") == request_id]

        wait_until(lambda: any(line["logger"] == "seuf.access" for line in found()), 10, "the line")
        return found()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A process of its own: logging is the process's."""
    folder = tmp_path_factory.mktemp("observed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SEUF_DATA_DIR": str(folder),
        "SEUF_SECRET": SECRET,
        "SEUF_LOG_FORMAT": "json",
    }
    migrate.upgrade(f"sqlite:///{folder / 'seuf.db'}")
    make = [sys.executable, "-m", "cli.main", "keys", "create", "--name", "first"]
    key = subprocess.check_output(make, env=environment, cwd=folder, text=True).splitlines()[-1]
    port = free_port()
    with (folder / "api.log").open("w") as log:
        command = [sys.executable, "-m", "uvicorn", "api.main:app", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        made = Running(f"http://127.0.0.1:{port}", key, folder / "api.log")
        wait_until(lambda: answers(made.url), 60, "the API")
        yield made
    finally:
        process.terminate()
        process.wait(20)
        # Over all tests of this file.
        told = (folder / "api.log").read_text()
        assert not [canary for canary in (WRITTEN, SECRET, key, "seuf_wrong") if canary in told]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_one_line_with_route_and_caller(running: Running) -> None:
    answer = running.ask("GET", f"/jobs/job_{WRITTEN}?name={WRITTEN}", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    (line,) = running.lines("mine-1")
    assert line.pop("milliseconds") > 0
    assert line.pop("key_id").startswith("key_")
    line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "seuf.access",
        "message": "GET /jobs/{job_id} 404",
        "request_id": "mine-1",
        "method": "GET",
        "route": "/jobs/{job_id}",
        "status": 404,
        "tenant": "default",
    }


def test_an_id_is_made_for_a_request_without_a_good_one(running: Running) -> None:
    answer = running.ask("GET", "/jobs", headers={"X-Request-Id": f"{WRITTEN} x"})
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert running.lines(answer.headers["X-Request-Id"])


def test_a_stranger_has_a_line_without_a_tenant(running: Running) -> None:
    answer = httpx.get(f"{running.url}/jobs", headers={"Authorization": "Bearer seuf_wrong"})
    (line,) = running.lines(answer.headers["X-Request-Id"])
    assert (line["status"], line["route"]) == (401, "none")
    assert not {"tenant", "key_id"} & line.keys()


def test_what_is_refused_is_not_told(running: Running) -> None:
    answer = running.ask("POST", "/jobs", json={"model": WRITTEN, "forget_set": {"examples": [{WRITTEN: 1}]}})
    assert answer.status_code == 422
    (line,) = running.lines(answer.headers["X-Request-Id"])
    assert line["route"] == "/jobs"


def test_probes_have_no_line(running: Running) -> None:
    answer = httpx.get(f"{running.url}/readyz")
    running.ask("GET", "/jobs")
    assert answer.headers["X-Request-Id"] not in running.log.read_text()


def test_a_crash_is_told_once_with_its_place(running: Running) -> None:
    # A table that is gone is nothing that the service is made for.
    import sqlite3

    with sqlite3.connect(running.log.parent / "seuf.db") as database:
        database.execute("ALTER TABLE models RENAME TO gone")
    try:
        answer = running.ask("GET", f"/models/{WRITTEN}")
    finally:
        with sqlite3.connect(running.log.parent / "seuf.db") as database:
            database.execute("ALTER TABLE gone RENAME TO models")
    assert answer.status_code >= 500
    lines = running.lines(answer.headers["X-Request-Id"])
    (told,) = (line for line in lines if line["logger"] == "seuf.api")
    assert told["message"] == "GET /models/{id_or_name} crashed"
    assert "no such table" in told["exception"]
    assert WRITTEN not in json.dumps(told)
    # uvicorn would tell of it again, with what the exception says.
    assert sum('"exception"' in line for line in running.log.read_text().splitlines()) == 1


def test_a_client_that_leaves_is_no_error(running: Running) -> None:
    port = int(running.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(
            b"POST /jobs HTTP/1.1\r\nHost: x\r\nX-Request-Id: left\r\nContent-Length: 100\r\n"
            + f"Authorization: Bearer {running.key}\r\n\r\n{{".encode()
        )
    lines = running.lines("left")
    assert {line["level"] for line in lines} == {"INFO"}
