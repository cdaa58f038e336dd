"""The tables. Typed columns only: no relationships, so no query can hide behind an attribute."""

from store.tables.access import ApiKey, AuditChain, AuditHead, AuditRow, IdempotentRequest, Tenant
from store.tables.base import Base, BigId, Json, Listed, StatusType, Tenanted, UtcDateTime, now
from store.tables.files import File, Upload, UploadPart
from store.tables.jobs import (
    Attribution,
    Checkpoint,
    Duty,
    Event,
    Job,
    Metric,
    Model,
    OutboxMessage,
    SelectedExpert,
)
from store.tables.webhooks import Webhook, WebhookAttempt, WebhookDelivery, WebhookMessage

__all__ = [
    "ApiKey",
    "Attribution",
    "AuditChain",
    "AuditHead",
    "AuditRow",
    "Base",
    "BigId",
    "Checkpoint",
    "Duty",
    "Event",
    "File",
    "IdempotentRequest",
    "Job",
    "Json",
    "Listed",
    "Metric",
    "Model",
    "OutboxMessage",
    "SelectedExpert",
    "StatusType",
    "Tenant",
    "Tenanted",
    "Upload",
    "UploadPart",
    "UtcDateTime",
    "Webhook",
    "WebhookAttempt",
    "WebhookDelivery",
    "WebhookMessage",
    "now",
]
