"""The audit log of the service, for `Client.audit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from client.types import AuditHead, AuditKey, AuditRow, Page


class AuditLog:
    """Read only: rows, signed heads, the public key, and the whole log to check elsewhere."""

    def __init__(self, get: Callable[..., Any], lines: Callable[[str], Iterator[bytes]]) -> None:
        self._get = get
        self._lines = lines

    def rows(
        self,
        *,
        who: str | None = None,
        what: str | None = None,
        object: str | None = None,  # noqa: A002  (the field's name)
        since: str | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Page[AuditRow]:
        """One page, newest first; every given filter must match."""
        page: Page[AuditRow] = self._get(
            "/audit", who=who, what=what, object=object, since=since, cursor=cursor, limit=limit
        )
        return page

    def heads(self) -> Iterator[AuditHead]:
        """Every signed head, newest first."""
        cursor = None
        while True:
            page: Page[AuditHead] = self._get("/audit/heads", cursor=cursor, limit=100)
            yield from page["data"]
            cursor = page["next"]
            if cursor is None:
                return

    def key(self) -> AuditKey:
        """The public key of the heads. Fetch it once, and keep it."""
        key: AuditKey = self._get("/audit/key")
        return key

    def export(self) -> Iterator[bytes]:
        """The whole log as lines of JSON: every row, then the newest head."""
        return self._lines("/audit/export")
