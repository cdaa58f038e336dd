"""API keys: made here, shown once, kept as an HMAC.

A key is seuf_, 8 characters that name it, 44 secret characters (220 bits) and a 6-character checksum, all
lower-case base32. The checksum lets a typo be told from a revoked key without a look in the database, and
lets secret scanners be sure.
"""

import hashlib
import hmac
import zlib
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.ids import ALPHABET, new_id, random_base32
from store.repository import Page, Repository
from store.tables import ApiKey, now

_NAME, _SECRET, _CHECK = 8, 44, 6
_START = "seuf_"


@dataclass(frozen=True)
class NewKey:
    """A fresh key: `token` is shown this once, `row` is what is kept."""

    token: str
    row: ApiKey


class Keys(Repository):
    """The keys of one tenant."""

    def create(self, name: str, secret: bytes) -> NewKey:
        """A new key; `secret` is Settings.secret_bytes()."""
        body = _START + random_base32(_NAME + _SECRET)
        token = body + _checksum(body)
        row = ApiKey(
            id=new_id("key"), name=name, prefix=_prefix(token), hmac=_hmac(token, secret), scopes=["admin"]
        )
        return NewKey(token, self._add(row))

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[ApiKey]:
        """Newest first."""
        return self._page(self._select(ApiKey), ApiKey, cursor, limit)

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing. NotFoundError if there is none."""
        row = self._one(self._select(ApiKey).where(ApiKey.id == key_id), "key", key_id)
        row.revoked_at = row.revoked_at or now()
        self.session.flush()


def authenticate(session: Session, token: str, secret: bytes) -> ApiKey | None:
    """The key row that `token` belongs to (its `tenant` is the caller's), or None: malformed, unknown or
    revoked.
    """
    if not well_formed(token):
        return None
    row = session.scalars(select(ApiKey).where(ApiKey.prefix == _prefix(token))).one_or_none()
    if row is None or row.revoked_at is not None:
        return None
    return row if hmac.compare_digest(row.hmac, _hmac(token, secret)) else None


def well_formed(token: str) -> bool:
    """Could this be a key of this service (shape and checksum)?"""
    body, check = token[:-_CHECK], token[-_CHECK:]
    right_length = len(token) == len(_START) + _NAME + _SECRET + _CHECK
    return right_length and token.startswith(_START) and _checksum(body) == check


def _prefix(token: str) -> str:
    return token[: len(_START) + _NAME]


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    return "".join(ALPHABET[number >> (5 * place) & 31] for place in range(_CHECK))


def _hmac(token: str, secret: bytes) -> str:
    return hmac.new(secret, token.encode(), hashlib.sha256).hexdigest()
