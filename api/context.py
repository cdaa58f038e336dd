"""What every route gets: the parts of the service, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from api.settings import ApiSettings
from store.artefacts import Artefacts
from store.database import Database


@dataclass(frozen=True)
class Service:
    """The parts of one API process; made once by `create_app`."""

    settings: ApiSettings
    database: Database
    artefacts: Artefacts


@dataclass(frozen=True)
class Caller:
    """Whose key opened the door: its id (for the audit log) and the tenant every query is bound to."""

    key_id: str
    tenant: str


def _service(request: Request) -> Service:
    return cast("Service", request.app.state.service)


# The check itself is KeyMiddleware's, before anything reads the body; this tells OpenAPI of it.
_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer seuf_...`")


def _caller(request: Request, _shown: Annotated[object, Security(_bearer)]) -> Caller:
    return cast("Caller", request.state.caller)


TheService = Annotated[Service, Depends(_service)]
TheCaller = Annotated[Caller, Depends(_caller)]
