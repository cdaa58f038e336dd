"""Who may do what, what was done, and which requests were answered already."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from store.tables.base import Base, BigId, Listed, Tenanted, now


class Tenant(Base):
    """A tenant and its own limits; null: those of the settings. One without a row has the settings' limits."""

    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    max_active_jobs: Mapped[int | None]
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None]


class ApiKey(Listed):
    """A key: what is shown of it, and the HMAC of the rest. The key itself is never stored.

    `rotated_to`: the id of the key that took its place; it goes on until `expires_at`.
    """

    __tablename__ = "api_keys"
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(32), unique=True)
    hmac: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]]
    expires_at: Mapped[datetime | None]
    rotated_to: Mapped[str | None] = mapped_column(String(32))
    revoked_at: Mapped[datetime | None]


class AuditRow(Tenanted):
    """Who did what to which object, and when. Only ever added to; never any text of a set.

    Numbered without gaps for each tenant; `hash` covers the row and the hash of the one before (store.audit).
    """

    __tablename__ = "audit"
    __table_args__ = (UniqueConstraint("tenant", "seq"), Index(None, "tenant", "object", "seq"))
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)
    who: Mapped[str] = mapped_column(String(64))
    what: Mapped[str] = mapped_column(String(64))
    object: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(128))
    at: Mapped[datetime] = mapped_column(default=now)
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditChain(Base):
    """Where a tenant's chain stands. Its row is held while one is added, so that two writers take turns."""

    __tablename__ = "audit_chains"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(String(64))


class AuditHead(Tenanted):
    """A signed statement that the chain had this row last: a chain cut off later no longer reaches it."""

    __tablename__ = "audit_heads"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True, sort_order=-1)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(default=now)
    key_id: Mapped[str] = mapped_column(String(64))
    signature: Mapped[str] = mapped_column(Text)


class IdempotentRequest(Tenanted):
    """A request that carried an Idempotency-Key, and its answer; without a status it is still in flight."""

    __tablename__ = "idempotency"
    __table_args__ = (Index(None, "created_at"),)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True, sort_order=-1)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    route: Mapped[str] = mapped_column(String(200))
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)
    status: Mapped[int | None]
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[str | None] = mapped_column(Text)
