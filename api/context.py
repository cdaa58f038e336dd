"""What every route gets: the parts of the service, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session

from api.settings import ApiSettings
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
        scopes: what the key may do (store.keys).
        request_id: goes with everything that the request leaves behind.
    """

    key_id: str
    tenant: str
    scopes: frozenset[str]
    request_id: str


def audit(session: Session, caller: Caller, what: str, object_id: str) -> None:
    """The caller did `what` ("job.create") to `object_id`, in the caller's transaction."""
    Audit(session, caller.tenant).record(caller.key_id, what, object_id, caller.request_id)


def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


# The check itself is KeyMiddleware's, before anything reads the body; this tells OpenAPI of it.
_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer seuf_...`")


def _caller(request: Request, _shown: Annotated[object, Security(_bearer)]) -> Caller:
    return cast("Caller", request.state.caller)


TheService = Annotated[Service, Depends(_service)]
TheCaller = Annotated[Caller, Depends(_caller)]
