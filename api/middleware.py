"""What happens to every request before a route sees it: an id, and bounds on its body's size and time."""

from __future__ import annotations

import asyncio
import re
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import REQUEST_ID_HEADER, Problem, respond

BYTES_PER_SECOND: Final = 1024
SHORT_BYTES: Final = 65536
# What a client may send as its own id: it ends in our log, so nothing that could forge a line of it.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIdMiddleware:
    """Takes X-Request-Id from the client or makes one, and returns it with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyMiddleware:
    """Guards every body: its size, before anything parses it, and its pace.

    Size: by its Content-Length, else by counting; `streamed` paths are read as they come, under caps of their own.
    Pace: waiting for bytes may take `patience` seconds, and one more for each KiB that has come. An answer that is
    given before a large body has ended ends the connection too: nobody reads the rest.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, streamed: re.Pattern[str], patience: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.streamed = streamed
        self.patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdigit() else None
        limit = None if self.streamed.fullmatch(scope["path"]) else self.max_bytes
        chunked = "transfer-encoding" in headers
        body = _Body(receive, limit, self.patience, ended=not chunked and not size)
        # A short rest is read and thrown away by the server; to end the connection would cost more.
        large = chunked or (size or 0) > SHORT_BYTES

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and large and not body.ended:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if limit is not None and size is not None and size > limit:
            response = respond(too_large(limit), scope["state"]["request_id"])
            await response(scope, receive, answer)
            return
        await self.app(scope, body.next, answer)


class _Body:
    """One body as it comes."""

    def __init__(self, receive: Receive, limit: int | None, patience: float, *, ended: bool) -> None:
        self.ended = ended
        self._receive = receive
        self._limit = limit
        self._patience = patience
        self._seen = 0
        self._waited = 0.0

    async def next(self) -> Message:
        """The next message. Problem: 413 past the limit, 408 when it takes too long."""
        if self.ended:  # whoever still listens waits for the client to leave
            return await self._receive()
        clock = asyncio.get_running_loop().time
        began = clock()
        left = self._patience + self._seen / BYTES_PER_SECOND - self._waited
        try:
            async with asyncio.timeout(left):
                message = await self._receive()
        except TimeoutError:
            raise _too_slow() from None
        self._waited += clock() - began
        self._seen += len(message.get("body", b""))
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        if self._limit is not None and self._seen > self._limit:
            raise too_large(self._limit)
        return message


def too_large(limit: int) -> Problem:
    """413 of a body that is no upload."""
    return Problem(
        413,
        "body_too_large",
        f"The request body is over the limit of {limit} bytes.",
        "Upload examples with POST /files and name the file in the job.",
    )


def _too_slow() -> Problem:
    return Problem(
        408,
        "body_too_slow",
        "The body came too slowly.",
        "Send it faster, or in smaller parts (POST /uploads).",
    )
