"""The door: every path needs an API key unless it is named here. Deny by default, before the body is read."""

from __future__ import annotations

from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.context import Caller
from api.problems import Problem, respond
from store.database import Database
from store.keys import authenticate

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", "/redoc"})
_SAY: Final = (
    "Send the header `Authorization: Bearer seuf_...`; `seuf up` prints a key, `seuf keys create` makes one."
)


class KeyMiddleware:
    """Finds the caller of a request by its key, or answers 401."""

    def __init__(self, app: ASGIApp, *, database: Database, secret: bytes) -> None:
        self.app = app
        self.database = database
        self.secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self.app(scope, receive, send)
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = None
        if scheme.lower() == "bearer" and token:
            caller = await run_in_threadpool(self._find, token.strip(), scope["state"]["request_id"])
        if caller is None:
            problem = _refusal(bool(token))
            await respond(problem, scope["state"]["request_id"])(scope, receive, send)
            return
        scope["state"]["caller"] = caller
        await self.app(scope, receive, send)

    def _find(self, token: str, request_id: str) -> Caller | None:
        with self.database.read() as session:
            row = authenticate(session, token, self.secret)
            return Caller(row.id, row.tenant, frozenset(row.scopes), request_id) if row is not None else None


def _refusal(given: bool) -> Problem:
    code, detail = (
        ("invalid_key", "The API key is not valid: mistyped, revoked, or of another service.")
        if given
        else ("missing_key", "This request carries no API key.")
    )
    return Problem(401, code, detail, _SAY, headers={"WWW-Authenticate": 'Bearer realm="seuf"'})
