"""Webhooks: endpoints, what there is to tell them, and how the telling went."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from store.tables.base import Listed, Tenanted


class Webhook(Listed):
    """An address that is told of events. Its signing secrets are stored encrypted.

    After a rotation the previous secret signs too, until `previous_secret_until`.
    """

    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "tenant", "created_at", "id"),)
    url: Mapped[str] = mapped_column(String(2048))
    description: Mapped[str] = mapped_column(String(200))
    events: Mapped[list[Any]]
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)
    previous_secret_until: Mapped[datetime | None]
    failing_since: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]


class WebhookMessage(Listed):
    """What there is to tell: event `seq` of a job, written in the transaction of the event itself.

    A test that somebody asked for has no job.
    """

    __tablename__ = "webhook_messages"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int | None]
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]


class WebhookDelivery(Listed):
    """A message on its way to an endpoint: pending, delivered or failed (given up)."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("webhook_id", "message_id"),
        Index(None, "status", "next_attempt_at"),
        Index(None, "webhook_id", "created_at", "id"),
    )
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    message_id: Mapped[str] = mapped_column(ForeignKey("webhook_messages.id"))
    status: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]


class WebhookAttempt(Tenanted):
    """One try: the answer's status, or why there was none."""

    __tablename__ = "webhook_attempts"
    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    milliseconds: Mapped[int]
    status_code: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(String(200))
