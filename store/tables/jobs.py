"""Models, jobs, and what a job found, measured and made."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from store.tables.base import Base, BigId, Listed, Tenanted, now
from store.transitions import Status


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
        Index(None, "finished_at"),
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
    request_id: Mapped[str | None] = mapped_column(String(128))
    traceparent: Mapped[str | None] = mapped_column(String(64))
    retry_of: Mapped[str | None] = mapped_column(String(32))
    max_seconds: Mapped[float | None]
    max_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)

    phase: Mapped[str | None] = mapped_column(String(16))
    phase_done: Mapped[int] = mapped_column(default=0)
    phase_total: Mapped[int] = mapped_column(default=0)
    step: Mapped[int | None]
    loss: Mapped[float | None]
    seconds_left: Mapped[float | None]

    cancel_requested: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)
    lost_leases: Mapped[int] = mapped_column(default=0)
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
    phase_seconds: Mapped[dict[str, Any] | None]


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


class Duty(Base):
    """Work that one process does for all of them (sweeps, reconciling): who has it, and until when."""

    __tablename__ = "duties"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    expires_at: Mapped[datetime]
