"""API keys: made here, shown once, kept as an HMAC.

A key is seuf_, 8 characters that name it, 44 secret characters (220 bits) and a 6-character checksum, all
lower-case base32. The checksum lets a typo be told from a revoked key without a look in the database, and
lets secret scanners be sure.
"""

import hashlib
import hmac
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from store import scopes
from store.errors import ExpiryRefusedError, KeyEndedError, TooManyKeysError
from store.ids import ALPHABET, new_id, random_base32
from store.repository import Page, Repository
from store.tables import ApiKey, now

_NAME, _SECRET, _CHECK = 8, 44, 6
_START = "seuf_"
MAX_KEYS: Final = 200
"""Valid keys of one tenant: rates are limited by key, so keys are limited too."""


@dataclass(frozen=True)
class NewKey:
    """A fresh key: `token` is shown this once, `row` is what is kept."""

    token: str
    row: ApiKey


class Keys(Repository):
    """The keys of one tenant."""

    def create(
        self,
        name: str,
        secret: bytes,
        allowed: Iterable[str] = (scopes.ADMIN,),
        expires_at: datetime | None = None,
    ) -> NewKey:
        """A new key with the scopes `allowed`; `secret` is Settings.secret_bytes().

        UnknownScopeError, ExpiryRefusedError (it lies in the past), TooManyKeysError.
        """
        if expires_at is not None and expires_at <= now():
            raise ExpiryRefusedError(
                f"{expires_at:%Y-%m-%d %H:%M} UTC has passed.", "Name a time that is still to come."
            )
        self._check_room()
        body = _START + random_base32(_NAME + _SECRET)
        token = body + _checksum(body)
        row = ApiKey(
            id=new_id("key"),
            name=name,
            prefix=_prefix(token),
            hmac=_hmac(token, secret),
            scopes=scopes.known(allowed),
            expires_at=expires_at,
        )
        return NewKey(token, self._add(row))

    def get(self, key_id: str) -> ApiKey:
        """The key, or NotFoundError."""
        return self._one(self._select(ApiKey).where(ApiKey.id == key_id), "key", key_id)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[ApiKey]:
        """Newest first."""
        return self._page(self._select(ApiKey), ApiKey, cursor, limit)

    def rotate(
        self, key_id: str, secret: bytes, overlap: timedelta, expires_at: datetime | None = None
    ) -> NewKey:
        """A new key of the same name and scopes; the old one goes on for `overlap`, at most to its own end.

        `expires_at`: of the new key; None: as the old one. NotFoundError; KeyEndedError where the key is revoked,
        expired or already rotated.
        """
        # Held, so that two who rotate at once do not make two successors.
        query = self._select(ApiKey).where(ApiKey.id == key_id).with_for_update()
        old = self._one(query.execution_options(populate_existing=True), "key", key_id)
        at = now()
        if ended := _ended(old, at) or (old.rotated_to and f"was rotated to {old.rotated_to}"):
            raise KeyEndedError(f"{key_id} {ended}, so it cannot be rotated.", "Make a new key.")
        made = self.create(old.name, secret, old.scopes, expires_at or old.expires_at)
        old.rotated_to = made.row.id
        old.expires_at = min(at + overlap, old.expires_at or at + overlap)
        self.session.flush()
        return made

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing. NotFoundError if there is none."""
        row = self.get(key_id)
        row.revoked_at = row.revoked_at or now()
        self.session.flush()

    def _check_room(self) -> None:
        valid = self._select(ApiKey).where(
            ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())
        )
        count = self.session.scalar(select(func.count()).select_from(valid.subquery())) or 0
        if count >= MAX_KEYS:
            raise TooManyKeysError(
                f"There are {count} valid keys; a tenant may have {MAX_KEYS}.", "Revoke those not in use."
            )


def authenticate(session: Session, token: str, secret: bytes) -> ApiKey | None:
    """The key row that `token` belongs to (its `tenant` is the caller's), or None: malformed, unknown, revoked
    or expired.
    """
    if not well_formed(token):
        return None
    row = session.scalars(select(ApiKey).where(ApiKey.prefix == _prefix(token))).one_or_none()
    if row is None or not hmac.compare_digest(row.hmac, _hmac(token, secret)):
        return None
    return None if _ended(row, now()) else row


def well_formed(token: str) -> bool:
    """Could this be a key of this service (shape and checksum)?"""
    body, check = token[:-_CHECK], token[-_CHECK:]
    right_length = len(token) == len(_START) + _NAME + _SECRET + _CHECK
    return right_length and token.startswith(_START) and _checksum(body) == check


def _ended(row: ApiKey, at: datetime) -> str:
    """Why the key opens nothing any more; empty while it does."""
    if row.revoked_at is not None:
        return "is revoked"
    return "has expired" if row.expires_at is not None and row.expires_at <= at else ""


def _prefix(token: str) -> str:
    return token[: len(_START) + _NAME]


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    return "".join(ALPHABET[number >> (5 * place) & 31] for place in range(_CHECK))


def _hmac(token: str, secret: bytes) -> str:
    return hmac.new(secret, token.encode(), hashlib.sha256).hexdigest()
