"""What every answer tells a browser or a cache, and which Host a request may name."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import Problem, respond

# The pages that load scripts and styles (of the documentation); they show nothing of anybody.
_PAGES: Final = frozenset({"/docs", "/redoc"})
# An answer opened in a browser runs nothing and loads nothing; the picture of the experts has its styles inside.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"


class HeadersMiddleware:
    """Answers are not sniffed, framed, run or cached, unless a route says how it may be cached.

    There is no CORS header: a page of another origin can read nothing, and preflights are refused.
    """

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...]) -> None:
        """`hosts`: names that may stand in the Host header; empty: any."""
        self.app = app
        self.hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
                if scope["path"] not in _PAGES:
                    headers["Content-Security-Policy"] = _POLICY
            await send(message)

        if self.hosts and _host(scope) not in self.hosts:
            problem = Problem(
                421,
                "unknown_host",
                "This service does not go by the name in the Host header.",
                "Use the address that its operator gave you; SEUF_ALLOWED_HOSTS lists the names.",
            )
            await respond(problem, scope["state"]["request_id"])(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)


def _host(scope: Scope) -> str:
    """The name in the Host header, without its port."""
    given = Headers(scope=scope).get("host", "").lower()
    name, _, port = given.rpartition(":")
    return name if name and port.isdigit() else given
