"""GET /readyz: does each part of the service work, and may this process be sent requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, cast

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import func, select

from api.context import Service, TheService
from store import census, migrate
from store.database import utc_now
from store.errors import StoreError
from store.tables import Job
from store.transitions import HELD

log = logging.getLogger("seuf.api")
router = APIRouter(tags=["service"])

STORAGE_SECONDS: Final = 30.0
"""A storage that worked is written to again after so long: a probe every few seconds would be many writes."""
STORAGE_AGAIN_SECONDS: Final = 5.0
"""One that did not is tried again after so long."""
WAITED_SECONDS: Final = 300.0
"""A job that waits so long while no worker has any: there is no worker."""


class PartHealth(BaseModel):
    """One part of the service."""

    ok: bool
    required: bool = Field(description="Whether this process can answer requests without it.")
    detail: str = Field(examples=["postgresql, at the newest migration"])


class Readiness(BaseModel):
    """Whether each part of the service works.

    `degraded`: requests are answered and jobs are taken in, but a part that runs them does not work.
    """

    status: Literal["ready", "degraded", "unready"]
    parts: dict[str, PartHealth]


@router.get("/readyz", responses={503: {"model": Readiness, "description": "A required part does not work."}})
def readyz(request: Request, service: TheService, response: Response) -> Readiness:
    """Whether each part works. 503 only without one that is required (database, storage): then send no requests here.

    A broker, dispatcher or worker that is away delays jobs and loses none, so the answer is 200 and `degraded`.
    """
    storage = cast("StorageProbe", request.app.state.storage_probe)
    checks: dict[str, Callable[[Service], str]] = {
        "database": _database,
        "storage": lambda _: storage.detail(),
    }
    if service.settings.broker_url:
        checks["broker"] = _broker
    checks |= {"dispatcher": _dispatcher, "workers": _workers}
    parts = {name: _try(name, check, service) for name, check in checks.items()}
    if not all(part.ok for part in parts.values() if part.required):
        response.status_code = 503
        return Readiness(status="unready", parts=parts)
    return Readiness(status="ready" if all(part.ok for part in parts.values()) else "degraded", parts=parts)


class StorageProbe:
    """Writes and reads the storage once in a while, and says in between how that went."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._until = 0.0
        self._failed: Exception | None = None

    def detail(self) -> str:
        """How it went. Raises what it raised."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._failed = self._probe()
                wait = STORAGE_SECONDS if self._failed is None else STORAGE_AGAIN_SECONDS
                self._until = time.monotonic() + wait
            if self._failed is not None:
                raise self._failed
            return f"written and read back within {STORAGE_SECONDS:.0f} s"

    def _probe(self) -> Exception | None:
        artefacts = self._service.artefacts
        try:
            with artefacts.open_write("health/probe") as out:
                out.write(b"ok")
            with artefacts.open_read("health/probe") as stored:
                if stored.read() != b"ok":
                    return _Unready("what was written reads back differently")
        except Exception as error:  # whatever it is, it is the answer
            return error
        return None


class _Unready(Exception):  # noqa: N818  (a finding, not a fault)
    """A part answers, but is not as it must be."""


_REQUIRED: Final = frozenset({"database", "storage"})


def _try(name: str, check: Callable[[Service], str], service: Service) -> PartHealth:
    required = name in _REQUIRED
    try:
        return PartHealth(ok=True, required=required, detail=check(service))
    except _Unready as reason:
        detail = str(reason)
    except StoreError as error:
        detail = error.message
    except Exception as error:  # whatever a part throws, readiness is the answer, never a crash
        # The kind only: the text of a driver's error can hold an address with a password.
        detail = f"{type(error).__name__}; the service's log has more"
        log.warning("%s is not ready", name, exc_info=error)
    return PartHealth(ok=False, required=required, detail=detail)


def _database(service: Service) -> str:
    if not migrate.at_head(service.database):
        raise _Unready("not at the newest migration; run `python -m migrations upgrade`")
    return f"{service.database.url.get_backend_name()}, at the newest migration"


def _broker(service: Service) -> str:
    from redis import Redis  # only where a broker is set: the embedded mode does not install it

    with Redis.from_url(service.settings.broker_url, socket_connect_timeout=2, socket_timeout=2) as redis:
        redis.ping()
    return "answers"


def _dispatcher(service: Service) -> str:
    with service.database.read() as session:
        silent = census.dispatcher_silent(session, utc_now(session))
    if silent is None:
        raise _Unready("none was ever seen; start one (with one machine: the worker)")
    if silent > census.SILENT_SECONDS:
        raise _Unready(f"none has been seen for {silent:.0f} s")
    return "at its duties"


def _workers(service: Service) -> str:
    with service.database.read() as session:
        waited = census.oldest_queued(session, utc_now(session))
        busy = session.execute(
            select(func.count(Job.lease_worker.distinct())).where(Job.status.in_(HELD))
        ).scalar_one()
    if not busy and waited > WAITED_SECONDS:
        raise _Unready(f"a job has waited for {waited:.0f} s, and no worker has any")
    return f"{busy} at work" if busy else "none is needed"
