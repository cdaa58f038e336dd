"""The tables. Typed columns only: no relationships, so no query can hide behind an attribute."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
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


class ApiKey(Listed):
    """A key: what is shown of it, and the HMAC of the rest. The key itself is never stored."""

    __tablename__ = "api_keys"
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(32), unique=True)
    hmac: Mapped[str] = mapped_column(String(64))
    revoked_at: Mapped[datetime | None]


class File(Listed):
    """An uploaded forget, retain or evaluation set; its bytes are the artefact files/<id>.jsonl."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant", "created_at", "id"),)
    purpose: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    examples: Mapped[int]
    tokens_estimate: Mapped[int] = mapped_column(BigInteger)


class Model(Listed):
    """A registered base model: where it lies and what it is (seuf_core.checkpoint.inspect)."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("tenant", "name"), Index(None, "tenant", "created_at", "id"))
    name: Mapped[str] = mapped_column(String(200))
    path: Mapped[str] = mapped_column(String(4096))
    digest: Mapped[str] = mapped_column(String(80))
    facts: Mapped[dict[str, Any]]


class Job(Listed):
    """One run of the method: what was asked, where it stands, and who holds it.

    The sets are named by file id and digest without a foreign key: a file may be deleted, its digest stays
    with the job.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "tenant", "created_at", "id"),
        Index(None, "status", "created_at", "id"),
    )
    status: Mapped[Status]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    forget_file: Mapped[str] = mapped_column(String(32))
    forget_sha256: Mapped[str] = mapped_column(String(64))
    retain_file: Mapped[str | None] = mapped_column(String(32))
    retain_sha256: Mapped[str | None] = mapped_column(String(64))
    evaluation_file: Mapped[str | None] = mapped_column(String(32))
    evaluation_sha256: Mapped[str | None] = mapped_column(String(64))
    method: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(BigInteger)
    meta: Mapped[dict[str, Any]] = mapped_column("metadata")

    phase: Mapped[str | None] = mapped_column(String(16))
    phase_done: Mapped[int] = mapped_column(default=0)
    phase_total: Mapped[int] = mapped_column(default=0)
    step: Mapped[int | None]
    loss: Mapped[float | None]
    seconds_left: Mapped[float | None]

    cancel_requested: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)
    lease_token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_worker: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    event_seq: Mapped[int] = mapped_column(default=0)

    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_fix: Mapped[str | None] = mapped_column(Text)
    checkpoint_id: Mapped[str | None] = mapped_column(String(32))
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Event(Tenanted):
    """What happened to a job, numbered from 1 without gaps."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=now)


class Attribution(Tenanted):
    """The score of every expert: matrix L x E over the MoE layers `layers`."""

    __tablename__ = "attributions"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    score: Mapped[str] = mapped_column(String(64))
    matrix: Mapped[list[Any]]
    layers: Mapped[list[Any]]
    stability: Mapped[dict[str, Any]]
    coverage: Mapped[float]


class SelectedExpert(Tenanted):
    """An expert that the job trains; rank 0 has the best score."""

    __tablename__ = "selected_experts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    expert: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rank: Mapped[int]
    score: Mapped[float]


class Metric(Tenanted):
    """One measured figure: stage (before, after, ...), set, domain, name, value, n, chance level if it has
    one.
    """

    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    stage: Mapped[str] = mapped_column(String(32), primary_key=True)
    set: Mapped[str] = mapped_column(String(16), primary_key=True)
    domain: Mapped[str] = mapped_column(String(200), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float | None]  # None: the model gave no number
    n: Mapped[int]
    chance: Mapped[float | None]


class Checkpoint(Listed):
    """A finished result: the artefact folder checkpoints/<id>.

    The row appears only after the whole folder.
    """

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "tenant", "created_at", "id"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[dict[str, Any]]


class OutboxMessage(Tenanted):
    """A job id to tell the broker, written with the job.

    `published_at` is set once nobody needs to be told any more.
    """

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "published_at", "id"),)
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    published_at: Mapped[datetime | None]


class AuditRow(Tenanted):
    """Who did what to which object, and when. Only ever added to; never any text of a set."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant", "id"),)
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    who: Mapped[str] = mapped_column(String(64))
    what: Mapped[str] = mapped_column(String(64))
    object: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(default=now)
