"""A service that loses nothing: limits and retries, uploads in parts, scopes, a chained audit log, webhooks."""

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
ID = sa.String(length=32)
TENANT = sa.String(length=64)
DIGEST = sa.String(length=64)
START = "0" * 64
JOB_COLUMNS = (
    "request_id",
    "traceparent",
    "retry_of",
    "max_seconds",
    "max_memory_bytes",
    "lost_leases",
    "phase_seconds",
)


def upgrade() -> None:
    """What exists keeps its meaning: keys may do all they could, files are JSON Lines, audit rows form a chain."""
    _keys()
    _files()
    _jobs()
    _audit_chains()
    _chain_audit()
    _uploads()
    _webhooks()
    _others()


def downgrade() -> None:
    """Back to the first schema. Deleted files lose their row, as they did then."""
    for table in (
        "duties",
        "idempotency",
        "tenants",
        "webhook_attempts",
        "webhook_deliveries",
        "webhook_messages",
        "webhooks",
        "upload_parts",
        "uploads",
        "audit_heads",
        "audit_chains",
    ):
        op.drop_table(table)
    with op.batch_alter_table("audit") as audit:
        audit.drop_index(op.f("ix_audit_tenant_object_seq"))
        audit.drop_constraint(op.f("uq_audit_tenant_seq"), type_="unique")
        for name in ("seq", "request_id", "previous_hash", "hash"):
            audit.drop_column(name)
        audit.create_index(op.f("ix_audit_tenant_id"), ["tenant", "id"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index(op.f("ix_jobs_finished_at"))
        for name in JOB_COLUMNS:
            jobs.drop_column(name)
    op.execute("DELETE FROM files WHERE deleted_at IS NOT NULL")
    with op.batch_alter_table("files") as files:
        for name in ("format", "uploaded_sha256", "uploaded_bytes", "deleted_at"):
            files.drop_column(name)
    with op.batch_alter_table("api_keys") as keys:
        for name in ("scopes", "expires_at", "rotated_to"):
            keys.drop_column(name)


def _keys() -> None:
    with op.batch_alter_table("api_keys") as keys:
        keys.add_column(sa.Column("scopes", JSON, nullable=False, server_default='["admin"]'))
        keys.add_column(sa.Column("expires_at", TIME, nullable=True))
        keys.add_column(sa.Column("rotated_to", ID, nullable=True))


def _files() -> None:
    with op.batch_alter_table("files") as files:
        files.add_column(sa.Column("format", sa.String(length=16), nullable=False, server_default="jsonl"))
        files.add_column(sa.Column("uploaded_sha256", DIGEST, nullable=True))
        files.add_column(sa.Column("uploaded_bytes", sa.BigInteger(), nullable=True))
        files.add_column(sa.Column("deleted_at", TIME, nullable=True))
    op.execute("UPDATE files SET uploaded_sha256 = sha256, uploaded_bytes = bytes")
    with op.batch_alter_table("files") as files:
        files.alter_column("uploaded_sha256", existing_type=DIGEST, nullable=False)
        files.alter_column("uploaded_bytes", existing_type=sa.BigInteger(), nullable=False)


def _jobs() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("request_id", sa.String(length=128), nullable=True))
        jobs.add_column(sa.Column("traceparent", sa.String(length=64), nullable=True))
        jobs.add_column(sa.Column("retry_of", ID, nullable=True))
        jobs.add_column(sa.Column("max_seconds", sa.Double(), nullable=True))
        jobs.add_column(sa.Column("max_memory_bytes", sa.BigInteger(), nullable=True))
        jobs.add_column(sa.Column("lost_leases", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("phase_seconds", JSON, nullable=True))
        jobs.create_index(op.f("ix_jobs_finished_at"), ["finished_at"])


def _audit_chains() -> None:
    op.create_table(
        "audit_chains",
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", DIGEST, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_audit_chains")),
    )
    op.create_table(
        "audit_heads",
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hash", DIGEST, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "seq", name=op.f("pk_audit_heads")),
    )


def _chain_audit() -> None:
    """Number and chain what is there already, in the order it was written."""
    with op.batch_alter_table("audit") as audit:
        audit.drop_index(op.f("ix_audit_tenant_id"))
        audit.add_column(sa.Column("seq", sa.BigInteger(), nullable=True))
        audit.add_column(sa.Column("request_id", sa.String(length=128), nullable=True))
        audit.add_column(sa.Column("previous_hash", DIGEST, nullable=True))
        audit.add_column(sa.Column("hash", DIGEST, nullable=True))
    _hash_rows()
    with op.batch_alter_table("audit") as audit:
        audit.alter_column("seq", existing_type=sa.BigInteger(), nullable=False)
        audit.alter_column("previous_hash", existing_type=DIGEST, nullable=False)
        audit.alter_column("hash", existing_type=DIGEST, nullable=False)
        audit.create_unique_constraint(op.f("uq_audit_tenant_seq"), ["tenant", "seq"])
        audit.create_index(op.f("ix_audit_tenant_object_seq"), ["tenant", "object", "seq"])


def _hash_rows() -> None:
    columns: list[sa.ColumnClause[Any]] = [
        sa.column(name) for name in ("tenant", "who", "what", "object", "request_id")
    ]
    more: list[sa.ColumnClause[Any]] = [
        sa.column("id"),
        sa.column("seq"),
        sa.column("at", TIME),
        sa.column("previous_hash"),
        sa.column("hash"),
    ]
    audit = sa.table("audit", *columns, *more)
    chains = sa.table("audit_chains", sa.column("tenant"), sa.column("seq"), sa.column("hash"))
    connection = op.get_bind()
    last: dict[str, tuple[int, str]] = {}
    rows = connection.execute(sa.select(audit).order_by(audit.c.id)).mappings().all()
    for row in rows:
        seq, previous = last.get(row["tenant"], (0, START))
        values = {"seq": seq + 1, "previous_hash": previous}
        values["hash"] = _hash({**row, **values})
        connection.execute(sa.update(audit).where(audit.c.id == row["id"]).values(values))
        last[row["tenant"]] = seq + 1, str(values["hash"])
    for tenant, (seq, digest) in last.items():
        connection.execute(sa.insert(chains).values(tenant=tenant, seq=seq, hash=digest))


def _hash(row: dict[str, Any]) -> str:
    """As store.audit had it at this revision; it stays so here whatever becomes of it there."""
    fields = ("tenant", "seq", "who", "what", "object", "request_id", "previous_hash")
    at = row["at"].replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    text = json.dumps(
        {"at": at, **{name: row[name] for name in fields}}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", DIGEST, nullable=True),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("file_id", ID, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_tenant_created_at_id"), "uploads", ["tenant", "created_at", "id"])
    op.create_index(op.f("ix_uploads_expires_at"), "uploads", ["expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("upload_id", ID, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", ID, nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id")),
        sa.PrimaryKeyConstraint("upload_id", "number", name=op.f("pk_upload_parts")),
    )


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("description", sa.String(length=200), nullable=False),
        sa.Column("events", JSON, nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("previous_secret", sa.Text(), nullable=True),
        sa.Column("previous_secret_until", TIME, nullable=True),
        sa.Column("failing_since", TIME, nullable=True),
        sa.Column("disabled_at", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_index(op.f("ix_webhooks_tenant_created_at_id"), "webhooks", ["tenant", "created_at", "id"])
    op.create_table(
        "webhook_messages",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("job_id", ID, nullable=True),
        sa.Column("seq", sa.Integer(), nullable=True),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_webhook_messages_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_messages")),
        sa.UniqueConstraint("job_id", "seq", name=op.f("uq_webhook_messages_job_id_seq")),
    )
    _deliveries()


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("webhook_id", ID, nullable=False),
        sa.Column("message_id", ID, nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", TIME, nullable=True),
        sa.Column("delivered_at", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_webhook_deliveries_webhook_id")
        ),
        sa.ForeignKeyConstraint(
            ["message_id"], ["webhook_messages.id"], name=op.f("fk_webhook_deliveries_message_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
        sa.UniqueConstraint("webhook_id", "message_id", name=op.f("uq_webhook_deliveries_webhook_id_message_id")),
    )
    for columns in (["status", "next_attempt_at"], ["webhook_id", "created_at", "id"]):
        op.create_index(op.f(f"ix_webhook_deliveries_{'_'.join(columns)}"), "webhook_deliveries", columns)
    op.create_table(
        "webhook_attempts",
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("delivery_id", ID, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.String(length=200), nullable=True),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["webhook_deliveries.id"], name=op.f("fk_webhook_attempts_delivery_id")
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("pk_webhook_attempts")),
    )


def _others() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", TENANT, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("max_active_jobs", sa.Integer(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant", TENANT, nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("route", sa.String(length=200), nullable=False),
        sa.Column("fingerprint", DIGEST, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", JSON, nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_created_at"), "idempotency", ["created_at"])
    op.create_table(
        "duties",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_duties")),
    )
