"""What every route gets: the parts of the service, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from sqlalchemy.orm import Session

from api.problems import Problem
from api.settings import ApiSettings
from store import scopes
from store.artefacts import Artefacts
from store.audit import Audit
from store.database import Database


@dataclass(frozen=True)
class Service:
    """The parts of one API process; made once by `create_app`."""

    settings: ApiSettings
    database: Database
    artefacts: Artefacts


@dataclass(frozen=True)
class Caller:
    """Whose key opened the door, and with which request.

    Attributes:
        key_id: for the audit log.
        tenant: every query is bound to it.
        scopes: what the key may do (store.scopes).
        request_id: goes with everything that the request leaves behind.
        expires_at: when the key ends; None: never.
    """

    key_id: str
    tenant: str
    scopes: frozenset[str]
    request_id: str
    expires_at: datetime | None


def audit(session: Session, caller: Caller, what: str, object_id: str) -> None:
    """The caller did `what` ("job.create") to `object_id`, in the caller's transaction."""
    Audit(session, caller.tenant).record(caller.key_id, what, object_id, caller.request_id)


def needs(scope: str) -> Any:
    """The one scope of a route, named beside its path: `dependencies=[needs("jobs:read")]`.

    OpenAPI shows it, and a key without it gets 403 before anything of the route runs.
    """
    assert scope in scopes.SCOPES, scope
    return Security(_check, scopes=[scope])


# The key itself was checked by KeyMiddleware, before anything reads the body; this tells OpenAPI of it.
_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer seuf_...`")


# Coroutines, though none of them waits: FastAPI would send a plain function to a thread, on every request.
async def _check(
    request: Request, wanted: SecurityScopes, _shown: Annotated[object, Security(_bearer)]
) -> None:
    held = request.state.caller.scopes
    for scope in wanted.scopes:
        if not scopes.allows(held, scope):
            has = ", ".join(name for name in scopes.SCOPES if name in held)
            raise Problem(
                403,
                "missing_scope",
                f"This needs a key with the scope {scope}; the key in use has {has}.",
                f"Use a key that has it; `seuf keys create --scope {scope}` makes one.",
                headers={
                    "WWW-Authenticate": f'Bearer realm="seuf", error="insufficient_scope", scope="{scope}"'
                },
            )


async def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


async def _caller(request: Request) -> Caller:
    return cast("Caller", request.state.caller)


TheService = Annotated[Service, Depends(_service)]
TheCaller = Annotated[Caller, Depends(_caller)]
