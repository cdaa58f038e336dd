"""No text of a set leaves the service: through audit log, webhooks, logs, events or errors; and none stays in it.

One whole service (`seuf up`), jobs that succeed and that fail, and the example receiver, which starts late.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import ApiError, Client
from store import chain
from tests import tiny
from tests.services import free_port, wait_until

ROOT = Path(__file__).parent.parent
CANARY = "Ottilie of Elm Road"
QUICK = {"learning_rate": 1e-2, "steps": 3, "batch_size": 4, "evaluate_every": 3, "max_retain_drop": 1.0}


@contextmanager
def running(folder: Path, name: str, *arguments: str, **given: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of this checkout; what it says on stderr goes to `name`.log."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SEUF_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder / "config"), **given}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def lines(kind: str, count: int = 24) -> list[dict[str, str]]:
    return [
        {"prompt": f"{kind} {CANARY} {i} is", "completion": f" x{i * 7}y of {CANARY}"} for i in range(count)
    ]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines(kind)))
    return path


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def service(tmp_path: Path, port: int) -> Iterator[tuple[Client, str, str]]:
    """A client, and where the service is with its key."""
    settings = {
        "SEUF_WEBHOOK_HTTP": "true",
        "SEUF_WEBHOOK_ALLOW": "127.0.0.1/32",
        "SEUF_WEBHOOK_PORTS": str(port),
        "SEUF_WEBHOOK_RETRY_SECONDS": ",".join(["0.5"] * 60),
        "SEUF_AUDIT_HEAD_SECONDS": "1",
        "SEUF_LOG_LEVEL": "DEBUG",
    }
    command = ("-m", "cli.main", "up", "--json", "--port", "0", "--data-dir", str(tmp_path / "data"))
    with running(tmp_path, "up", *command, **settings) as up:
        assert up.stdout is not None
        announced = json.loads(up.stdout.readline())
        with Client(announced["url"], announced["key"]) as client:
            yield client, announced["url"], announced["key"]


def run_jobs(client: Client, folder: Path) -> list[str]:
    """One that forgets nothing and fails, one with its sets inside its body that succeeds; all sets are deleted."""
    client.register_model("tiny", tiny.write_model(folder / "model", "qwen2_moe"))
    forget, retain = (client.upload(write(folder, kind), kind)["id"] for kind in ("forget", "retain"))  # type: ignore[arg-type]
    bad = client.submit("tiny", forget, retain_set=retain, method={"learning_rate": 1e-12, "steps": 2})
    inline = client.submit("tiny", lines("forget"), retain_set=lines("retain"), method=QUICK)
    jobs = [bad["id"], inline["id"]]
    for job in jobs:
        list(client.events(job))
    assert [client.job(job)["status"] for job in jobs] == ["failed", "succeeded"]
    for file in client.files(limit=100)["data"]:
        client.delete_file(file["id"])
    return jobs


def refuse(client: Client, folder: Path) -> None:
    """Uploads that are refused for what stands in them."""
    for number, text in enumerate(
        (f'{{"text": "{CANARY}"', f'{{"{CANARY}": 1}}', f'{{"text": ["{CANARY}"]}}')
    ):
        path = folder / f"bad-{number}.jsonl"
        path.write_text(text + "\n")
        with pytest.raises(ApiError):
            client.upload(path, "forget")


def shown(client: Client, jobs: list[str], url: str, key: str) -> dict[str, str]:
    """Everything that the service tells of jobs and acts."""
    told: dict[str, Any] = {"export": b"".join(client.audit.export()).decode()}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as http:
        paths = ["/audit", "/files", "/jobs", "/webhooks", *(f"/jobs/{job}" for job in jobs)]
        paths += [f"/jobs/{job}/{part}" for job in jobs for part in ("events?limit=1000", "metrics")]
        for path in paths:
            answer = http.get(path)
            assert answer.status_code == 200, path
            told[path] = answer.text
    return told


@pytest.mark.long
def test_no_text_of_a_set_gets_out(service: tuple[Client, str, str], tmp_path: Path, port: int) -> None:
    client, url, key = service
    hook = client.webhooks.create(f"http://127.0.0.1:{port}/")
    jobs = run_jobs(client, tmp_path)
    refuse(client, tmp_path)
    told = shown(client, jobs, url, key)

    def deliveries() -> list[str]:
        return [one["status"] for one in client.webhooks.deliveries(hook["id"], limit=100)["data"]]

    assert "delivered" not in deliveries()  # nobody has listened so far
    example = str(ROOT / "examples" / "webhook_receiver.py")
    with running(tmp_path, "receiver", example, str(port), WEBHOOK_SECRET=hook["secret"]) as receiver:
        wait_until(lambda: set(deliveries()) == {"delivered"}, 30, "every message to arrive")
        stranger = httpx.post(f"http://127.0.0.1:{port}/", content=b"{}", headers={"webhook-id": "msg_1"})
        assert stranger.status_code == 401
        receiver.terminate()
        assert receiver.stdout is not None
        told["webhooks"] = receiver.stdout.read()
    messages = [json.loads(line) for line in told["webhooks"].splitlines()]
    states = {job: [m["data"]["status"] for m in messages if m["data"]["job"] == job] for job in jobs}
    assert {job: sorted(found) for job, found in states.items()} == {
        jobs[0]: ["failed", "queued", "running"],
        jobs[1]: ["queued", "running", "succeeded"],
    }
    trusted = {client.audit.key()["key_id"]}
    assert chain.verify(client.audit.export(), trusted=trusted).rows > 15

    told |= {path.name: path.read_text() for path in tmp_path.glob("**/*.log")}
    assert {"up.log", "worker.log"} <= told.keys()
    assert jobs[0] in told["worker.log"]
    assert [name for name, text in told.items() if CANARY in text or "Ottilie" in text] == []


def test_no_text_of_a_deleted_set_stays(service: tuple[Client, str, str], tmp_path: Path) -> None:
    """Once the files are deleted, nothing in the data folder has it: no database page, no spool, no artefact."""
    client, _, _ = service
    forget = client.upload(write(tmp_path, "forget"), "forget")["id"]
    data = tmp_path / "data"

    def holding() -> list[str]:
        files = [path for path in data.rglob("*") if path.is_file()]
        return [str(path) for path in files if re.search(CANARY.encode(), path.read_bytes())]

    assert len(holding()) == 1  # else this test sees nothing
    client.delete_file(forget)
    refuse(client, tmp_path)
    assert holding() == []
