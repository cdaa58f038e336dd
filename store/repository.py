"""The one choke point that adds the tenant to every query, and the cursor pages that every list uses."""

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from sqlalchemy import Delete, Select, Update, delete, select, tuple_, update
from sqlalchemy.orm import Session

from store.errors import InvalidCursorError, NotFoundError
from store.tables import Listed, Tenanted

DEFAULT_TENANT = "default"
MAX_PAGE = 100

Row = TypeVar("Row", bound=Tenanted)
ListedRow = TypeVar("ListedRow", bound=Listed)


@dataclass(frozen=True)
class Page(Generic[Row]):
    """One page of a list, newest first. `next` is the cursor of the following page, None on the last."""

    data: list[Row]
    next: str | None

    @property
    def has_more(self) -> bool:
        """Is there another page?"""
        return self.next is not None


class Repository:
    """Queries of one tenant inside the caller's transaction. Never commits."""

    def __init__(self, session: Session, tenant: str = DEFAULT_TENANT) -> None:
        self.session = session
        self.tenant = tenant

    def _select(self, table: type[Row]) -> Select[Row]:
        return select(table).where(table.tenant == self.tenant)

    def _update(self, table: type[Row]) -> Update:
        return update(table).where(table.tenant == self.tenant)

    def _delete(self, table: type[Row]) -> Delete:
        return delete(table).where(table.tenant == self.tenant)

    def _add(self, row: Row) -> Row:
        row.tenant = self.tenant
        self.session.add(row)
        self.session.flush()
        return row

    def _one(self, query: Select[Row], kind: str, id_or_name: str) -> Row:
        row = self.session.scalars(query).one_or_none()
        if row is None:
            raise NotFoundError(kind, id_or_name)
        return row

    def _page(
        self, query: Select[ListedRow], table: type[ListedRow], cursor: str | None, limit: int
    ) -> Page[ListedRow]:
        """Keyset page: newest first, continuing after the row that `cursor` names, `limit` rows (1 to
        MAX_PAGE).
        """
        limit = max(1, min(limit, MAX_PAGE))
        if cursor is not None:
            query = query.where(tuple_(table.created_at, table.id) < _decode(cursor))
        query = query.order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)
        rows = list(self.session.scalars(query))
        more = len(rows) > limit
        return Page(rows[:limit], _encode(rows[limit - 1]) if more else None)


def _encode(row: Listed) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at.isoformat()}|{row.id}".encode()).decode()


def _decode(cursor: str) -> tuple[datetime, str]:
    try:
        at, id_ = base64.urlsafe_b64decode(cursor.encode()).decode().split("|")
        created_at = datetime.fromisoformat(at)
        if created_at.tzinfo is None or not id_.replace("_", "").isalnum():
            raise ValueError(at)
    except (ValueError, binascii.Error) as error:
        raise InvalidCursorError(
            f"{cursor!r} is not a cursor of this service.", "Use the `next` of a page as it is."
        ) from error
    return created_at, id_
