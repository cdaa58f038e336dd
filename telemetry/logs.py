"""Log lines of every process in one form, each with what it is about: request, job, attempt, tenant.

`configure` once at start. `about` says what the lines of a block are about, `process_is_about` what those of the
whole process are. No line holds text of a set, a key or a password: see `_without_message`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal

LogFormat = Literal["text", "json"]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
Fields = dict[str, str | int | float | None]

OURS: Final = ("seuf", "api", "cli", "migrations", "seuf_core", "store", "worker")
OTHERS: Final = ("celery", "uvicorn")
"""Libraries whose INFO says something to an operator. DEBUG of a library may hold a password or a signature, and INFO
of an HTTP client the address of a webhook: of others only warnings are shown, whatever the level.
"""

_about: ContextVar[Fields] = ContextVar("about", default={})  # noqa: B039  (never changed in place)
_process: Fields = {}


def configure(log_format: LogFormat, level: Level = "INFO") -> None:
    """Send every log line of this process to standard error in our form, uvicorn's and Celery's too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    for name in OTHERS:
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLevelName(level)))
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    logging.getLogger("uvicorn.error").filters = [_told_already]
    # Ours (seuf.access) has the route instead of the address with its query.
    logging.getLogger("uvicorn.access").handlers, logging.getLogger("uvicorn.access").propagate = [], False
    logging.captureWarnings(True)


def _told_already(record: logging.LogRecord) -> bool:
    """Keeps uvicorn from telling of a crash again: api.problems has, with the request's id."""
    return not str(record.msg).startswith("Exception in ASGI application")


@contextmanager
def about(
    *,
    request_id: str | None = None,
    job_id: str | None = None,
    attempt: int | None = None,
    tenant: str | None = None,
    key_id: str | None = None,
) -> Iterator[None]:
    """What the lines of the block are about, besides what they already are about."""
    token = _about.set({**_about.get(), **_given(request_id, job_id, attempt, tenant, key_id)})
    try:
        yield
    finally:
        _about.reset(token)


def process_is_about(
    *,
    request_id: str | None = None,
    job_id: str | None = None,
    attempt: int | None = None,
    tenant: str | None = None,
) -> None:
    """What every line of this process is about from now on, whichever thread writes it."""
    _process.update(_given(request_id, job_id, attempt, tenant, None))


def _given(
    request_id: str | None, job_id: str | None, attempt: int | None, tenant: str | None, key_id: str | None
) -> Fields:
    fields: Fields = {
        "request_id": request_id,
        "job_id": job_id,
        "attempt": attempt,
        "tenant": tenant,
        "key_id": key_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fields(record: logging.LogRecord) -> Fields:
    """What the record is about, and the fields its writer gave: extra={"fields": {...}}."""
    return {**_process, **_about.get(), **getattr(record, "fields", {})}


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _without_message(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items() if value is not None)
        line = f"{at} {record.levelname:7} {record.name}: {record.getMessage()}"
        line = f"{line}  [{fields}]" if fields else line
        if record.exc_info and record.exc_info[1] is not None:
            line = f"{line}\n{_without_message(record.exc_info[1])}"
        # A control character could forge a line on a terminal.
        return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in line)


_SAFE: Final = frozenset({"OSError", "OperationalError", "InterfaceError"})
"""Kinds of errors, by the name of a class they derive from, whose message comes from the system: a file, a socket, a
database that is away. That of any other may quote what it was given, which may be a set or a key.
"""


def _without_message(error: BaseException) -> str:
    """Where an exception, and what led to it, came from; what it says only where that cannot quote the data."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{_without_message(cause)}\nwhich led to\n" if cause is not None else ""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = f": {str(error).splitlines()[0]}" if kinds & _SAFE and str(error) else ""
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return f"{before}{''.join(traceback.format_tb(error.__traceback__))}{name}{said}"
