"""The door: every path needs an API key unless it is named here. Deny by default, before the body is read."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.context import Caller
from api.limits import RateLimits
from api.problems import Problem, respond
from api.settings import ApiSettings
from store.database import Database
from store.keys import authenticate, well_formed
from store.tenants import limits_of
from telemetry import logs

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", "/redoc"})
KEY_SECONDS: Final = 3.0
"""For so long a key that was looked up is known without a look in the database: so long a revoked one may go on."""
KNOWN_KEYS: Final = 10_000
_SAY: Final = (
    "Send the header `Authorization: Bearer seuf_...`; `seuf up` prints a key, `seuf keys create` makes one."
)


@dataclass(frozen=True)
class Holder:
    """Who has a key, as the database said at `looked_up` (of the clock that only grows)."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    expires_at: datetime | None
    requests_per_minute: int
    looked_up: float

    def is_known(self) -> bool:
        """Is this still to be believed without a look? An expiry is exact, a revocation KEY_SECONDS late."""
        expired = self.expires_at is not None and self.expires_at <= datetime.now(UTC)
        return not expired and time.monotonic() - self.looked_up < KEY_SECONDS


class KeyMiddleware:
    """Finds the caller of a request by its key, or answers 401; counts its requests, or answers 429."""

    def __init__(self, app: ASGIApp, *, database: Database, settings: ApiSettings) -> None:
        self.app = app
        self.database = database
        self.secret = settings.secret_bytes()
        self.limits = settings.limits()
        self.rates = RateLimits(settings.broker_url)
        # By digest: a dump of this process's memory has no keys of callers who are not at work.
        self.known: OrderedDict[bytes, Holder] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self.app(scope, receive, send)
            return
        request_id = scope["state"]["request_id"]
        try:
            holder = await self._holder(scope)
            told = await self.rates.count(holder.key_id, holder.requests_per_minute)
        except Problem as problem:
            await respond(problem, request_id)(scope, receive, send)
            return
        scope["state"]["caller"] = Caller(
            holder.key_id, holder.tenant, holder.scopes, request_id, holder.expires_at
        )

        async def send_with_rate(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(told)
            await send(message)

        with logs.about(tenant=holder.tenant, key_id=holder.key_id):
            await self.app(scope, receive, send_with_rate if told else send)

    async def _holder(self, scope: Scope) -> Holder:
        """Who calls. Problem: 401 without a valid key, 429 after too many invalid ones from one address."""
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise _refusal(given=False)
        name = hashlib.sha256(token.encode()).digest()
        known = self.known.get(name)
        if known is not None and known.is_known():
            return known
        self.known.pop(name, None)
        address = scope["client"][0] if scope.get("client") else "unknown"
        # Before the database is asked: guessing costs it nothing. (A key in use is known, so nobody who shares the
        # address of a guesser is shut out in the middle of their work.)
        await self.rates.check_failures(address)
        holder = await run_in_threadpool(self._find, token) if well_formed(token) else None
        if holder is None:
            await self.rates.count_failure(address)
            raise _refusal(given=True)
        self.known[name] = holder
        if len(self.known) > KNOWN_KEYS:
            self.known.popitem(last=False)
        return holder

    def _find(self, token: str) -> Holder | None:
        looked_up = time.monotonic()  # before the look: what changes during it is seen in time too
        with self.database.read() as session:
            row = authenticate(session, token, self.secret)
            if row is None:
                return None
            rate = limits_of(session, row.tenant, self.limits).requests_per_minute
        return Holder(row.id, row.tenant, frozenset(row.scopes), row.expires_at, rate, looked_up)


def _refusal(*, given: bool) -> Problem:
    code, detail = (
        ("invalid_key", "The API key is not valid: mistyped, revoked, expired, or of another service.")
        if given
        else ("missing_key", "This request carries no API key.")
    )
    return Problem(401, code, detail, _SAY, headers={"WWW-Authenticate": 'Bearer realm="seuf"'})
