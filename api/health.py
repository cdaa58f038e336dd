"""Is the process alive, is every part of the service there, and what can this service do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from api.context import Service, TheCaller, TheService, needs
from api.docs import problems
from api.jobs import INLINE_BYTES
from seuf_core import method
from seuf_core.data.records import Limits
from seuf_core.families import FAMILIES
from seuf_core.version import __version__
from store import migrate

log = logging.getLogger("seuf.api")
public = APIRouter(tags=["service"])
router = APIRouter(tags=["service"])


class PartHealth(BaseModel):
    """One part of the service."""

    ok: bool
    detail: str = Field(examples=["at revision 0001"])


class Readiness(BaseModel):
    """Whether each part of the service works."""

    status: Literal["ready", "unready"]
    parts: dict[str, PartHealth]


@public.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@public.get("/readyz", responses={503: {"model": Readiness, "description": "A part does not work."}})
def readyz(service: TheService, response: Response) -> Readiness:
    """Whether each part works: database at its newest migration, storage writable, broker if one is set."""
    checks: dict[str, Callable[[Service], str]] = {"database": _database, "storage": _storage}
    if service.settings.broker_url:
        checks["broker"] = _broker
    parts = {name: _try(check, service) for name, check in checks.items()}
    ready = all(part.ok for part in parts.values())
    if not ready:
        response.status_code = 503
    return Readiness(status="ready" if ready else "unready", parts=parts)


def _try(check: Callable[[Service], str], service: Service) -> PartHealth:
    try:
        return PartHealth(ok=True, detail=check(service))
    except _Unready as reason:
        return PartHealth(ok=False, detail=str(reason))
    except Exception as error:  # whatever a part throws, readiness is the answer, never a crash
        log.warning("%s is not ready", check.__name__.strip("_"), exc_info=error)
        # The class only: the text of a driver's error can hold an address with a password.
        return PartHealth(ok=False, detail=f"{type(error).__name__}; the service's log has more")


class _Unready(Exception):  # noqa: N818  (a finding, not a fault)
    """A part answers, but is not as it must be."""


def _database(service: Service) -> str:
    if not migrate.at_head(service.database):
        raise _Unready("not at the newest migration; run `python -m migrations upgrade`")
    return f"{service.database.url.get_backend_name()}, at the newest migration"


def _storage(service: Service) -> str:
    key = "health/probe"
    with service.artefacts.open_write(key) as out:
        out.write(b"ok")
    with service.artefacts.open_read(key) as stored:
        if stored.read() != b"ok":
            raise _Unready("what was written reads back differently")
    return "written and read back"


def _broker(service: Service) -> str:
    from redis import Redis  # only where a broker is set: the embedded mode does not install it

    with Redis.from_url(service.settings.broker_url, socket_connect_timeout=2, socket_timeout=2) as redis:
        redis.ping()
    return "answers"


@router.get("/capabilities", dependencies=[needs("jobs:read")], responses=problems())
def capabilities(service: TheService, _caller: TheCaller) -> dict[str, Any]:
    """What this service can do: architectures, the choices of a method with their presets, and its limits."""
    limits = Limits()
    return {
        "version": __version__,
        "architectures": sorted(FAMILIES),
        "presets": method.PRESETS,
        "objectives": list(get_args(method.Objective)),
        "scopes": list(get_args(method.Scope)),
        "attributions": list(get_args(method.Attribution)),
        "spreads": list(get_args(method.Spread)),
        "router_modes": list(get_args(method.RouterMode)),
        "retain_losses": list(get_args(method.RetainLoss)),
        "lane": service.settings.lane,
        "limits": {
            "upload_bytes": service.settings.max_upload_bytes,
            "upload_part_bytes": service.settings.upload_part_bytes,
            "file_bytes": service.settings.max_file_bytes,
            "line_bytes": limits.max_line_bytes,
            "examples": limits.max_examples,
            "inline_bytes": INLINE_BYTES,
        },
        "method_schema": method.Method.model_json_schema(),
    }
