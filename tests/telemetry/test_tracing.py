"""One trace from a client's request to the phases of the engine, over real processes and a real collector."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from client import Client
from store import migrate
from telemetry import tracing
from tests.services import free_port, wait_until
from tests.serving import lines_of
from tests.telemetry.receiver import Collector, collecting
from tests.tiny import write_model

ROOT = Path(__file__).parents[2]
TRACE = "0af7651916cd43dd8448eb211c80319c"
ABOVE = "b7ad6b7169203331"
FORGET_TEXT = "Ottilie"


@contextmanager
def service(folder: Path, **more: str) -> Iterator[tuple[str, str]]:
    """API and worker of one machine on SQLite, with an engine of no work; yields address and key."""
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SEUF_DATA_DIR": str(folder / "data"),
        "SEUF_SECRET": "w9Kx2PqLr7Tz4VbN8mYc3HsD6fGjA1eU",
        "SEUF_ENGINE_ENTRY": "tests.worker.entries:works",
        "SEUF_WARM_ENGINE": "false",
        **more,
    }
    migrate.upgrade(f"sqlite:///{folder / 'data/seuf.db'}")
    make = [sys.executable, "-m", "cli.main", "keys", "create", "--name", "first"]
    key = subprocess.check_output(make, env=environment, cwd=folder, text=True).splitlines()[-1]
    with ExitStack() as stack:
        for program in (["uvicorn", "api.main:app", "--port", str(port)], ["worker"]):
            log = stack.enter_context((folder / f"{program[0]}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", *program], env=environment, cwd=folder, stdout=log, stderr=log
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url), 60, "the API")
        yield url, key


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def run_job(url: str, key: str, model: Path, traceparent: str) -> str:
    """A job of no work, to its end; returns its id."""
    with Client(url, key) as client:
        client.register_model("tiny", model)
        sets = {
            f"{kind}_set": {"content": "\n".join(lines_of(kind)), "format": "jsonl"}
            for kind in ("forget", "retain")
        }
        sets["forget_set"]["content"] = sets["forget_set"]["content"].replace("Elm", FORGET_TEXT)
        asked = {"Authorization": f"Bearer {key}", "traceparent": traceparent}
        submitted = httpx.post(f"{url}/jobs?dry={FORGET_TEXT}", json={"model": "tiny", **sets}, headers=asked)
        assert submitted.status_code == 202, submitted.text
        for _ in client.events(submitted.json()["id"]):
            pass
        assert client.job(submitted.json()["id"])["status"] == "succeeded"
        return str(submitted.json()["id"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one, which the engine of no work does not open."""
    return write_model(tmp_path_factory.mktemp("model") / "olmoe", "olmoe")


def test_one_trace_over_all_processes(tmp_path: Path, model: Path) -> None:
    with collecting() as collector:
        on = {"SEUF_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with service(tmp_path, **on) as (url, key):
            job_id = run_job(url, key, model, f"00-{TRACE}-{ABOVE}-01")
            httpx.get(f"{url}/readyz")
        # Stopped in good order: what was left has been sent.
        check(collector, job_id, key)


def check(collector: Collector, job_id: str, key: str) -> None:
    request = collector.named("seuf-api", "POST /jobs")
    assert (request.trace, request.parent) == (TRACE, ABOVE)
    assert request.attributes["http.response.status_code"] == "202"
    assert request.attributes["url.query"] == "REDACTED"
    attempt = collector.named("seuf-worker", "attempt")
    assert (attempt.trace, attempt.parent) == (TRACE, request.id)
    assert (attempt.attributes["job.id"], attempt.attributes["job.attempt"]) == (job_id, "1")
    phases = [span for span in collector.spans if span.service == "seuf-engine"]
    assert [span.name for span in phases] == ["validating", "attributing", "unlearning", "evaluating"]
    assert {(span.trace, span.parent) for span in phases} == {(TRACE, attempt.id)}
    assert not any(span.failed for span in collector.spans)
    assert not any("readyz" in span.name for span in collector.spans)
    sent = b"".join(collector.bodies)
    assert FORGET_TEXT.encode() not in sent
    assert key.encode() not in sent


def test_a_collector_that_is_away_holds_nobody_up(tmp_path: Path, model: Path) -> None:
    on = {"SEUF_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with service(tmp_path, **on) as (url, key):
        run_job(url, key, model, f"00-{TRACE}-{ABOVE}-01")
        began = time.monotonic()
    assert time.monotonic() - began < 15


def test_when_it_is_off_nothing_of_it_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, api.main, worker.engine, worker.supervisor\n"
        "from telemetry import tracing\n"
        "assert tracing.current() is None\n"
        "with tracing.span('x'): pass\n"
        "tracing.Spans(None).begin('x'); tracing.finish(1)\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'google'))])"
    )
    environment = {
        **os.environ,
        "SEUF_DATA_DIR": str(tmp_path),
        "SEUF_SECRET": "w9Kx2PqLr7Tz4VbN8mYc3HsD6fGjA1eU",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_asked_for_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(tracing.TracingError, match=r"seuf\[tracing\]"):
        tracing.start("seuf-api")
