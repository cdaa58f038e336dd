"""Log lines: one form for all, with what they are about, and nothing that was entrusted to us."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store.database import Database
from telemetry import logs

SECRET_TEXT = "Die Katze von Frau Sommer heisst Ottilie"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Logging is the process's: what a test sets is undone."""
    names = ["", "uvicorn", "uvicorn.error", "uvicorn.access", *logs.OURS, *logs.OTHERS]
    loggers = [logging.getLogger(name) for name in names]
    kept = [(one.level, one.handlers, one.propagate, one.filters) for one in loggers]
    yield
    for one, (level, handlers, propagate, filters) in zip(loggers, kept, strict=True):
        one.level, one.handlers, one.propagate, one.filters = level, handlers, propagate, filters
        one.manager._clear_cache()  # type: ignore[attr-defined]
    logging.captureWarnings(False)
    logs._process.clear()


Captured = pytest.CaptureFixture[str]


def lines(capsys: Captured) -> list[dict[str, Any]]:
    """What was logged as JSON."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_says_when_what_and_about_what(capsys: Captured) -> None:
    logs.configure("json")
    with logs.about(request_id="req_1", tenant="acme"), logs.about(job_id="job_1", attempt=2):
        logging.getLogger("worker.supervisor").warning("%s taken", "job_1")
    logging.getLogger("seuf.api").info("no more")
    first, second = lines(capsys)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "WARNING",
        "logger": "worker.supervisor",
        "message": "job_1 taken",
        "request_id": "req_1",
        "tenant": "acme",
        "job_id": "job_1",
        "attempt": 2,
    }
    assert second.keys() == {"time", "level", "logger", "message"}


def test_fields_of_the_line_stand_beside_its_message(capsys: Captured) -> None:
    logs.configure("json")
    fields = {"status": 200, "route": "/jobs/{job_id}"}
    logging.getLogger("seuf.access").info("GET /jobs/{job_id} 200", extra={"fields": fields})
    (line,) = lines(capsys)
    assert (line["status"], line["route"]) == (200, "/jobs/{job_id}")


def test_a_process_is_about_its_job_in_every_thread(capsys: Captured) -> None:
    logs.configure("json")
    logs.process_is_about(job_id="job_9", attempt=1)
    thread = threading.Thread(target=lambda: logging.getLogger("worker.engine").info("in a thread"))
    thread.start()
    thread.join()
    (line,) = lines(capsys)
    assert (line["job_id"], line["attempt"]) == ("job_9", 1)


def test_an_exception_is_told_by_place_and_kind_without_its_message(capsys: Captured) -> None:
    logs.configure("json")
    try:
        try:
            int(SECRET_TEXT)
        except ValueError as error:
            raise RuntimeError(f"cannot read {SECRET_TEXT}") from error
    except RuntimeError:
        logging.getLogger("seuf.api").exception("it broke")
    (line,) = lines(capsys)
    assert SECRET_TEXT not in json.dumps(line, ensure_ascii=False)
    assert line["exception"].splitlines()[-1] == "RuntimeError"
    assert "ValueError\nwhich led to\n" in line["exception"]
    assert "test_logs.py" in line["exception"]


def test_what_the_system_says_of_a_file_or_a_database_is_told(capsys: Captured) -> None:
    logs.configure("json")
    away = Database("postgresql://seuf:the-password@127.0.0.1:1/seuf")
    try:
        Path("/nowhere/at/all").read_bytes()
    except OSError:
        logging.getLogger("seuf.api").exception("no file")
    try:
        away.engine.connect()
    except Exception:
        logging.getLogger("seuf.api").exception("no database")
    file, database = lines(capsys)
    assert "No such file or directory: '/nowhere/at/all'" in file["exception"]
    assert "refused" in database["exception"]
    assert "the-password" not in database["exception"]


def test_servers_speak_in_the_same_form_and_libraries_only_when_it_matters(capsys: Captured) -> None:
    logs.configure("json")
    import uvicorn

    uvicorn.Config("api.main:app")  # sets up logging of its own, as `uvicorn` does before it loads the app
    logs.configure("json", "DEBUG")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("celery.worker").info("ready")
    logging.getLogger("uvicorn.access").info('127.0.0.1 - "GET /jobs?metadata=secret HTTP/1.1" 200')
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n")
    logging.getLogger("httpx").info("HTTP Request: POST https://hooks.example/?token=secret")
    logging.getLogger("botocore.auth").debug("signature")
    logging.getLogger("celery.worker").debug("what a broker said")
    logging.getLogger("worker.engine").debug("ours")
    logging.getLogger("httpx").warning("a warning")
    told = [line["message"] for line in lines(capsys)]
    assert told == ["Started server process", "ready", "ours", "a warning"]


def test_a_line_for_people(capsys: Captured) -> None:
    logs.configure("text", "WARNING")
    logging.getLogger("seuf.api").info("too quiet")
    with logs.about(request_id="req_1"):
        logging.getLogger("seuf.api").warning("odd\x1b[2Jname\rover")
    line = capsys.readouterr().err
    assert line.endswith("WARNING seuf.api: odd\\x1b[2Jname\\rover  [request_id=req_1]\n")


def test_it_works_in_a_process_that_has_only_just_begun() -> None:
    program = (
        "from telemetry import logs; import logging, warnings; logs.configure('json')\nwarnings.warn('old')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["logger"] == "py.warnings"
