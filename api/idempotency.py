"""Idempotency-Key: a POST that creates something may be sent again, and creates it once.

A route takes `once: TheOnce` and ends its transaction with `return once.answer(session, status, body, headers)`: the
answer is kept in the transaction that creates, so whoever asks again gets it, whatever died in between. A request that
is refused creates nothing and is not kept: the same key may be used again once it is put right. Without the header
nothing is kept.

For a body that is not read as a whole (uploads) a route takes `once: TheUploadOnce` and calls `once.begin` itself,
with the digest of what it read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Final

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.context import Caller, Service, TheCaller, TheService
from api.problems import FieldError, Problem
from store.idempotency import Answered, Asked, Idempotency

IN_FLIGHT: Final = timedelta(seconds=60)
"""A request at work for longer than this is taken for dead: the next one of its key does the work instead."""
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_JSON: Final = "application/json"


class Replayed(Exception):  # noqa: N818  (an answer, not a fault)
    """The request was answered before; `response` is that answer."""

    def __init__(self, answered: Answered) -> None:
        super().__init__()
        headers = {**answered.headers, "Idempotent-Replayed": "true"}
        self.response = Response(answered.body, answered.status, headers, media_type=_JSON)


class Once:
    """The one answer of a request, whether or not it carries a key."""

    def __init__(self, service: Service, caller: Caller, route: str, key: str | None) -> None:
        self._service, self._caller, self._route, self._key = service, caller, route, key
        self._reserved_at: datetime | None = None

    def begin(self, content: bytes) -> None:
        """Reserve the key for this request; `content`: its body, or a digest of all of it that matters.

        Raises:
            Replayed: it was answered before.
            InFlightError, IdempotencyKeyReusedError: see store.idempotency.
        """
        if self._key is None:
            return
        asked = Asked(self._key, self._route, hashlib.sha256(content).hexdigest())
        keep = timedelta(hours=self._service.settings.idempotency_hours)
        with self._service.database.write() as session:
            found = Idempotency(session, self._caller.tenant).reserve(asked, IN_FLIGHT, keep)
        if isinstance(found, Answered):
            raise Replayed(found)
        self._reserved_at = found

    def answer(
        self,
        session: Session,
        status: int,
        body: BaseModel,
        headers: Mapping[str, str],
        *,
        kept: BaseModel | None = None,
    ) -> Response:
        """The answer, kept in the transaction of `session` if the request carries a key.

        `kept`: what a replay shows instead, where the answer holds a secret that is shown once.
        """
        if self._key is not None and self._reserved_at is not None:
            again = Answered(status, headers, (kept or body).model_dump_json())
            Idempotency(session, self._caller.tenant).answer(self._key, self._reserved_at, again)
        return Response(body.model_dump_json(), status, headers, media_type=_JSON)

    def end(self) -> None:
        """Give the key back if nothing was answered under it."""
        if self._key is not None and self._reserved_at is not None:
            with self._service.database.write() as session:
                Idempotency(session, self._caller.tenant).release(self._key, self._reserved_at)


Given = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Your own name of this request, 1 to 255 visible ASCII characters, such as a UUID. Sent again with "
        "the same body it gets the first answer again (with `Idempotent-Replayed: true`) and creates nothing.",
        examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
    ),
]


async def _upload_once(
    request: Request, service: TheService, caller: TheCaller, idempotency_key: Given = None
) -> AsyncIterator[Once]:
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        detail = "An Idempotency-Key has 1 to 255 visible ASCII characters."
        error = FieldError("invalid_idempotency_key", detail, parameter="Idempotency-Key")
        raise Problem(422, error.code, detail, "Use a UUID.", errors=[error])
    route = f"{request.method} {request.url.path}"
    once = Once(service, caller, route[:200], idempotency_key)
    try:
        yield once
    except BaseException:
        await run_in_threadpool(once.end)
        raise


async def _once(request: Request, once: Annotated[Once, Depends(_upload_once)]) -> Once:
    # (FastAPI has read the body by now, and keeps it.)
    await run_in_threadpool(once.begin, await request.body())
    return once


TheUploadOnce = Annotated[Once, Depends(_upload_once)]
TheOnce = Annotated[Once, Depends(_once)]


async def replay(_request: Request, error: Exception) -> Response:
    """The exception handler of Replayed."""
    assert isinstance(error, Replayed)
    return error.response
