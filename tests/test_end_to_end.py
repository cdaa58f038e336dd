"""The whole way through real HTTP and a real worker process: on Postgres and Redis, and embedded.

Upload, register, submit, watch, look at the results, download, open with transformers, compare every byte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from client import Client
from tests import tiny
from tests.services import free_port, wait_until

ROOT = Path(__file__).parent.parent
QUICK = {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "evaluate_every": 3, "max_retain_drop": 1.0}


@contextmanager
def process(folder: Path, name: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of this checkout, stopped by SIGTERM at the end."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder / "config"), **environment}
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", *arguments]
        started = subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(30)
            finally:
                started.kill()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Client]:
    """`seuf up`: one process tree on SQLite."""
    with process(
        tmp_path, "up", "cli.main", "up", "--json", "--port", "0", "--data-dir", str(tmp_path / "data")
    ) as up:
        assert up.stdout is not None
        announced = json.loads(up.stdout.readline())
        with Client(announced["url"], announced["key"]) as client:
            yield client


@pytest.fixture
def cluster(tmp_path: Path, postgres_url: str, redis_url: str) -> Iterator[Client]:
    """API, dispatcher and Celery worker as processes of their own, on Postgres and Redis."""
    environment = {
        "SEUF_DATABASE_URL": postgres_url,
        "SEUF_BROKER_URL": redis_url,
        "SEUF_DATA_DIR": str(tmp_path / "data"),
        "SEUF_SECRET": "a secret of this test, long enough for anybody",
    }
    created = subprocess.run(
        [sys.executable, "-m", "cli.main", "keys", "create", "--name", "first", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    url = f"http://127.0.0.1:{free_port()}"
    api = ["uvicorn", "api.main:app", "--port", url.rsplit(":", 1)[1]]
    worker = ["celery", "-A", "worker.app", "worker", "--concurrency", "1", "--pool", "solo"]
    with ExitStack() as stack:
        stack.enter_context(process(tmp_path, "api", *api, **environment))
        stack.enter_context(process(tmp_path, "dispatcher", "worker.dispatcher", **environment))
        stack.enter_context(process(tmp_path, "worker", *worker, **environment))
        wait_until(lambda: answers(f"{url}/readyz"), 60, "the API is ready")
        yield stack.enter_context(Client(url, json.loads(created.stdout)["key"]))


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(params=["embedded", "cluster"])
def client(request: pytest.FixtureRequest) -> Client:
    """A service in one of its two forms."""
    found: Client = request.getfixturevalue(request.param)
    return found


def examples(folder: Path, kind: str) -> Path:
    rows = [{"prompt": f"{kind} {i} is", "completion": f" x{i * 7}y", "domain": kind} for i in range(40)]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tensors(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes()
        for shard in folder.glob("model*.safetensors")
        for name, tensor in load_file(shard).items()
    }


def test_from_an_upload_to_a_model_that_opens(client: Client, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    client.register_model("tiny", model)
    forget = client.upload(examples(tmp_path, "element"), "forget")["id"]
    retain = client.upload(examples(tmp_path, "country"), "retain")["id"]
    for preset in ("default", "paper"):
        job = client.submit("tiny", forget, retain_set=retain, method={"preset": preset, **QUICK})
        events = list(client.events(job["id"]))
        job = client.job(job["id"])
        assert job["status"] == "succeeded", job["error"]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert {"selection", "look", "step", "status"} <= {event["type"] for event in events}
        check_results(client, job["id"], paper=preset == "paper")

        folder = client.download(str(job["checkpoint"]), tmp_path / preset)
        AutoModelForCausalLM.from_pretrained(folder)
        before, after = tensors(model), tensors(folder)
        changed = {name for name in before if before[name] != after[name]}
        assert changed
        assert changed <= set(load_file(folder / "delta.safetensors"))
    refused(client, forget, retain)


def check_results(client: Client, job: str, *, paper: bool) -> None:
    attribution = client.attribution(job)
    assert attribution["score"] == ("affinity" if paper else "contrast")
    assert [len(row) for row in attribution["matrix"]] == [8, 8, 8]
    if paper:
        assert len(attribution["selection"]) == 1
    figures: dict[tuple[str, str, str], Any] = {
        (row["stage"], row["set"], row["name"]): row["value"] for row in client.metrics(job)["data"]
    }
    before, after = (figures[stage, "forget", "probability"] for stage in ("before", "after"))
    assert after < before


def refused(client: Client, forget: str, retain: str) -> None:
    """A job that cannot be done fails with the reason, and there is no checkpoint."""
    job = client.submit("tiny", forget, retain_set=retain, method={"learning_rate": 1e-12, "steps": 2})
    list(client.events(job["id"]))
    job = client.job(job["id"])
    assert job["status"] == "failed"
    assert job["error"] is not None
    assert job["error"]["code"] == "nothing_forgotten"
    assert job["error"]["fix"]
    assert job["checkpoint"] is None
