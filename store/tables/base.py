"""What every table is made of: times in UTC, JSON, named constraints, and the tenant of a row."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    Integer,
    MetaData,
    String,
    TypeDecorator,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.transitions import Status

Json = JSON().with_variant(JSONB(), "postgresql")
BigId = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself only for INTEGER
StatusType = Enum(
    Status, native_enum=False, length=16, values_callable=lambda kinds: [kind.value for kind in kinds]
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time.

    SQLite has no time zones, so they are dropped on the way in and put back on the way out.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a naive time: nobody can say what it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A time without a zone cannot be stored. Use datetime.now(UTC).")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Always UTC, always aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """The time of a row. (Leases use store.database.utc_now, the database's clock.)"""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can name them too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it as it stands)
        datetime: UtcDateTime,
        dict[str, Any]: Json,
        list[Any]: Json,
        Status: StatusType,
    }


class Tenanted(Base):
    """Every row belongs to one tenant; store.repository adds the condition."""

    __abstract__ = True
    tenant: Mapped[str] = mapped_column(String(64), sort_order=-1)


class Listed(Tenanted):
    """A row with an id that lists show, newest first."""

    __abstract__ = True
    id: Mapped[str] = mapped_column(String(32), primary_key=True, sort_order=-2)
    created_at: Mapped[datetime] = mapped_column(default=now)
