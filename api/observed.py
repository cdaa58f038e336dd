"""What is told of every request: its id in every log line, one line at its end, its time as a figure.

The line has the route, not the address: ids are in the audit log, and a query may hold what a customer wrote.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telemetry import logs

log = logging.getLogger("seuf.access")

PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""What machines ask all day: their lines are for DEBUG, and they make no traces."""
NO_ROUTE: Final = "none"
"""Stands for the route of a request that was refused before it came to one, or found none."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ANSWER: Final = 499  # what nginx logs for a client that left before its answer


class ObservedMiddleware:
    """Right inside the one that gives a request its id."""

    def __init__(self, app: ASGIApp, *, requests: Histogram) -> None:
        self.app = app
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answered, status = time.perf_counter(), 0.0, _NO_ANSWER

        async def seen(message: Message) -> None:
            nonlocal answered, status
            if message["type"] == "http.response.start":
                answered, status = time.perf_counter(), message["status"]
            await send(message)

        with logs.about(request_id=scope["state"]["request_id"]):
            try:
                await self.app(scope, receive, seen)
            except Exception:
                # The answer to a crash is made outside of this. A stream that breaks off has its status already.
                status, answered = (status, answered) if answered else (500, time.perf_counter())
                raise
            finally:
                self._tell(scope, status, began, answered or time.perf_counter())

    def _tell(self, scope: Scope, status: int, began: float, answered: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path_format", NO_ROUTE)
        self.requests.labels(method, route, str(status)).observe(answered - began)
        milliseconds = round((time.perf_counter() - began) * 1000, 1)
        fields = {"method": method, "route": route, "status": status, "milliseconds": milliseconds}
        if caller := scope["state"].get("caller"):
            fields |= {"tenant": caller.tenant, "key_id": caller.key_id}
        level = logging.DEBUG if route in PROBES and status < 500 else logging.INFO
        log.log(level, "%s %s %d", method, route, status, extra={"fields": fields})
