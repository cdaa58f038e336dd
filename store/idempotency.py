"""Requests that may be sent again: each Idempotency-Key with what was asked and what was answered.

A key is reserved before the work and its answer is written in the transaction of the work itself. So a process that
dies in between leaves either both or nothing. A reservation that is left behind is taken over after a while; whoever
held it can then no longer write the answer, and with that the work is rolled back too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from store.database import utc_now
from store.errors import IdempotencyKeyReusedError, InFlightError
from store.repository import Repository
from store.tables import IdempotentRequest


@dataclass(frozen=True)
class Asked:
    """A request: its Idempotency-Key, its method and path, and a digest of all that matters of its content."""

    key: str
    route: str
    fingerprint: str


@dataclass(frozen=True)
class Answered:
    """The answer that the first request of a key got."""

    status: int
    headers: Mapping[str, str]
    body: str


class Idempotency(Repository):
    """The requests of one tenant."""

    def reserve(self, asked: Asked, stale: timedelta, keep: timedelta) -> datetime | Answered:
        """The answer, if there is one; else the key is the caller's, under the time that is returned.

        A reservation older than `stale` is taken over, an answer older than `keep` is forgotten.
        IdempotencyKeyReusedError for another request under the same key; InFlightError while the first is at work.
        """
        at = utc_now(self.session)
        dialect = sqlite if self.session.get_bind().dialect.name == "sqlite" else postgresql
        fresh = {"route": asked.route, "fingerprint": asked.fingerprint, "created_at": at}
        insert = dialect.insert(IdempotentRequest).values(tenant=self.tenant, key=asked.key, **fresh)
        added = self.session.execute(
            insert.on_conflict_do_nothing().returning(IdempotentRequest.key)
        ).one_or_none()
        if added is not None:
            return at
        row = self.session.scalars(
            self._select(IdempotentRequest)
            .where(IdempotentRequest.key == asked.key)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if row is None:  # it was released between the two statements
            raise InFlightError(asked.key)
        if at - row.created_at < keep:
            if (row.route, row.fingerprint) != (asked.route, asked.fingerprint):
                raise IdempotencyKeyReusedError(
                    f"The Idempotency-Key {asked.key!r} came with another request before.",
                    "Use a new key for each request; the same one only to send the very same again.",
                )
            if row.status is not None:
                return Answered(row.status, row.headers or {}, row.body or "")
            if at - row.created_at < stale:
                raise InFlightError(asked.key)
        row.route, row.fingerprint, row.created_at = asked.route, asked.fingerprint, at
        row.status = row.headers = row.body = None
        self.session.flush()
        return at

    def answer(self, key: str, reserved_at: datetime, answered: Answered) -> None:
        """Write the answer. InFlightError if the reservation was taken over: the caller's work must not stay."""
        values = {
            "status": answered.status,
            "headers": dict(answered.headers),
            "body": answered.body,
        }
        query = self._update(IdempotentRequest).where(*_held(key, reserved_at)).values(values)
        if not self.session.execute(query.returning(IdempotentRequest.key)).all():
            raise InFlightError(key)

    def release(self, key: str, reserved_at: datetime) -> None:
        """The request failed and left nothing: the next one of this key starts anew."""
        self.session.execute(self._delete(IdempotentRequest).where(*_held(key, reserved_at)))


def expire(session: Session, keep: timedelta) -> int:
    """Forget what is older than `keep`, of all tenants; returns how many."""
    old = delete(IdempotentRequest).where(IdempotentRequest.created_at < utc_now(session) - keep)
    return len(session.execute(old.returning(IdempotentRequest.key)).all())


def _held(key: str, reserved_at: datetime) -> tuple[Any, ...]:
    return (
        IdempotentRequest.key == key,
        IdempotentRequest.created_at == reserved_at,
        IdempotentRequest.status.is_(None),
    )
