"""Webhooks: addresses that are told of jobs, their secrets, and how the telling went."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final, Literal, get_args

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from api import schemas, views
from api.context import Service, TheCaller, TheService, audit, needs
from api.docs import problems
from api.idempotency import TheOnce
from api.problems import at
from store import tables
from store.receivers import ReceiverRefusedError
from store.sealed import Sealer, new_secret
from store.webhooks import Webhooks

router = APIRouter(prefix="/webhooks", tags=["webhooks"])

DAY: Final = 86_400
EventType = Literal[
    "job.queued",
    "job.running",
    "job.cancelling",
    "job.cancelled",
    "job.succeeded",
    "job.failed",
    "job.rejected",
]
WEBHOOK_ID: Final = "wh_b2c3d4e5f6g7h2i3j4k5"
_SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="  # noqa: S105  (the example of the standard)
_URL: Final = "https://hooks.example.com/seuf"
_UrlField = Field(
    max_length=2048, examples=[_URL], description="Where messages are sent: a public https address."
)
_EventsField = Field(
    description="Which changes of a job are told.", examples=[["job.succeeded", "job.failed"]]
)


def _once(events: list[EventType]) -> list[EventType]:
    if not events:
        raise ValueError("name at least one event, or leave the field out for all")
    return list(dict.fromkeys(events))


class WebhookCreate(schemas.Body):
    """An address that is to be told of jobs."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": _URL, "events": ["job.succeeded", "job.failed"]}]}
    )
    url: schemas.Text = _UrlField
    events: list[EventType] = Field(
        default_factory=lambda: list(get_args(EventType)),
        max_length=len(get_args(EventType)),
        description="Which changes of a job are told; default: all.",
        examples=[["job.succeeded", "job.failed"]],
    )
    description: schemas.Text = Field("", max_length=200, description="For yourselves.")

    _distinct = field_validator("events")(_once)


class WebhookChange(schemas.Body):
    """What is to change; what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"disabled": False}]})
    url: schemas.Text | None = Field(None, max_length=2048, examples=[_URL], description="The new address.")
    events: list[EventType] | None = Field(None, max_length=len(get_args(EventType)), description="The new list.")
    description: schemas.Text | None = Field(None, max_length=200)
    disabled: bool | None = Field(
        None, description="true: send nothing and give up what is on its way; false: send again from now on."
    )

    @field_validator("events")
    @classmethod
    def _distinct(cls, events: list[EventType] | None) -> list[EventType] | None:
        return None if events is None else _once(events)

    @model_validator(mode="after")
    def _something(self) -> WebhookChange:
        if all(value is None for value in (self.url, self.events, self.description, self.disabled)):
            raise ValueError("give at least one of url, events, description and disabled")
        return self


class SecretRotation(schemas.Body):
    """How the old secret goes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_seconds": 3600}]})

    overlap_seconds: int = Field(
        DAY,
        ge=0,
        le=7 * DAY,
        description="Seconds in which messages carry a signature by each of the two secrets; 0: by the new one only.",
    )


class Webhook(schemas.Answer):
    """An address that is told of jobs. Its secret is not shown again."""

    id: str = Field(examples=[WEBHOOK_ID])
    object: Literal["webhook"] = "webhook"
    url: str = Field(examples=[_URL])
    description: str
    events: list[str]
    disabled: bool = Field(description="Nothing is sent.")
    disabled_at: schemas.UtcTime | None
    failing_since: schemas.UtcTime | None = Field(description="First failure after the last success.")
    previous_secret_until: schemas.UtcTime | None = Field(
        description="Until then the secret before signs too."
    )
    created_at: schemas.UtcTime


class NewSecret(Webhook):
    """The webhook with its secret, which is shown this once."""

    secret: str | None = Field(
        description="Signs the messages (Standard Webhooks). A replay by Idempotency-Key has null here: rotate it.",
        examples=[_SECRET],
    )


class Attempt(schemas.Answer):
    """One try to deliver a message. A number that is missing was cut off: the service ended in the middle of it."""

    number: int
    at: schemas.UtcTime
    milliseconds: int
    status_code: int | None = Field(description="HTTP status of the answer; null: none came.", examples=[503])
    error: str | None = Field(description="Why none came.", examples=["No answer within 15 s."])


class Delivery(BaseModel):
    """A message on its way to this webhook."""

    id: str = Field(examples=["del_c2d3e4f5g6h7i2j3k4l5"])
    object: Literal["webhook_delivery"] = "webhook_delivery"
    message: str = Field(
        description="What the receiver sees as webhook-id.", examples=["msg_d2e3f4g5h6i7j2k3l4m5"]
    )
    type: str = Field(examples=["job.succeeded"])
    job: str | None = Field(examples=[schemas.JOB_ID])
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: schemas.UtcTime | None
    delivered_at: schemas.UtcTime | None
    created_at: schemas.UtcTime
    log: list[Attempt] = Field(description="The newest 20 attempts, oldest first.")


@router.post(
    "",
    dependencies=[needs("webhooks:write")],
    status_code=201,
    response_model=NewSecret,
    responses=problems(400, 409, 422),
)
def create_webhook(
    body: WebhookCreate, service: TheService, caller: TheCaller, once: TheOnce
) -> Response:
    """Be told of jobs: each change of state as a signed POST, by the rules of Standard Webhooks.

    Messages come at least once and in no promised order: `webhook-id` tells a repeated one. `secret` is in this answer
    and never again. The address must be a public one, unless the operator allows others; it is checked again, with
    every address its name has, at each delivery.
    """
    _check_url(service, body.url)
    secret = new_secret()
    sealed = Sealer(service.settings.secret_bytes()).seal(secret)
    with service.database.write() as session:
        row = Webhooks(session, caller.tenant).create(body.url, body.description, body.events, sealed)
        audit(session, caller, "webhook.create", row.id)
        answer, headers = _with_secret(row, secret), {"Location": f"/webhooks/{row.id}"}
        return once.answer(session, 201, answer, headers, kept=answer.model_copy(update={"secret": None}))


@router.get("", dependencies=[needs("webhooks:read")], responses=problems(422))
def list_webhooks(
    service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[Webhook]:
    """The webhooks, newest first."""
    with service.database.read() as session:
        page = Webhooks(session, caller.tenant).list(query.cursor, query.limit)
    return views.page(page, _view)


@router.get("/{webhook_id}", dependencies=[needs("webhooks:read")], responses=problems(404))
def get_webhook(webhook_id: str, service: TheService, caller: TheCaller) -> Webhook:
    """One webhook."""
    with service.database.read() as session:
        return _view(Webhooks(session, caller.tenant).get(webhook_id))


@router.patch("/{webhook_id}", dependencies=[needs("webhooks:write")], responses=problems(400, 404, 422))
def change_webhook(webhook_id: str, body: WebhookChange, service: TheService, caller: TheCaller) -> Webhook:
    """Change a webhook, disable it, or enable it again (it was disabled for answering 410 or failing for days)."""
    if body.url is not None:
        _check_url(service, body.url)
    with service.database.write() as session:
        hooks = Webhooks(session, caller.tenant)
        row = hooks.held(webhook_id)
        row.url = body.url if body.url is not None else row.url
        row.events = list(body.events) if body.events is not None else row.events
        row.description = body.description if body.description is not None else row.description
        if body.disabled is not None:
            (hooks.disable if body.disabled else hooks.enable)(row)
        session.flush()
        audit(session, caller, "webhook.update", row.id)
    return _view(row)


@router.delete(
    "/{webhook_id}", dependencies=[needs("webhooks:write")], status_code=204, responses=problems(404)
)
def delete_webhook(webhook_id: str, service: TheService, caller: TheCaller) -> None:
    """Delete a webhook and the log of its deliveries. A message that is being sent this moment may still arrive."""
    with service.database.write() as session:
        Webhooks(session, caller.tenant).delete(webhook_id)
        audit(session, caller, "webhook.delete", webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret", dependencies=[needs("webhooks:write")], responses=problems(400, 404, 422)
)
def rotate_secret(
    webhook_id: str, service: TheService, caller: TheCaller, body: SecretRotation | None = None
) -> NewSecret:
    """A new secret, shown this once. For the overlap each message carries two signatures, so a receiver that knows
    either secret accepts it.
    """
    overlap = timedelta(seconds=(body or SecretRotation(overlap_seconds=DAY)).overlap_seconds)
    secret = new_secret()
    sealed = Sealer(service.settings.secret_bytes()).seal(secret)
    with service.database.write() as session:
        row = Webhooks(session, caller.tenant).rotate(webhook_id, sealed, overlap)
        audit(session, caller, "webhook.rotate_secret", row.id)
    return _with_secret(row, secret)


@router.post(
    "/{webhook_id}/test",
    dependencies=[needs("webhooks:write")],
    status_code=202,
    responses=problems(404, 409),
)
def test_webhook(webhook_id: str, service: TheService, caller: TheCaller) -> Delivery:
    """Send a message of type `webhook.test` the way that all go. Its delivery shows how it went."""
    with service.database.write() as session:
        hooks = Webhooks(session, caller.tenant)
        row = hooks.test(webhook_id)
        audit(session, caller, "webhook.test", webhook_id)
        return _deliveries(hooks, [row])[0]


@router.get("/{webhook_id}/deliveries", dependencies=[needs("webhooks:read")], responses=problems(404, 422))
def list_deliveries(
    webhook_id: str, service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[Delivery]:
    """What was sent to a webhook, newest first, with every attempt."""
    with service.database.read() as session:
        hooks = Webhooks(session, caller.tenant)
        page = hooks.deliveries(webhook_id, query.cursor, query.limit)
        shown = _deliveries(hooks, page.data)
    return schemas.Page(data=shown, has_more=page.has_more, next=page.next)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/replay",
    dependencies=[needs("webhooks:write")],
    status_code=202,
    responses=problems(404, 409),
)
def replay_delivery(webhook_id: str, delivery_id: str, service: TheService, caller: TheCaller) -> Delivery:
    """Send a message again, delivered or given up, under the same `webhook-id`."""
    with service.database.write() as session:
        hooks = Webhooks(session, caller.tenant)
        row = hooks.replay(webhook_id, delivery_id)
        audit(session, caller, "webhook.replay", delivery_id)
        return _deliveries(hooks, [row])[0]


def _check_url(service: Service, url: str) -> None:
    try:
        service.settings.receivers().target(url)
    except ReceiverRefusedError as error:
        raise at("/url", 422, error.code, error.message, error.fix) from error


def _view(row: tables.Webhook) -> Webhook:
    return Webhook.model_validate({**_fields(row)})


def _with_secret(row: tables.Webhook, secret: str) -> NewSecret:
    return NewSecret.model_validate({**_fields(row), "secret": secret})


def _fields(row: tables.Webhook) -> dict[str, object]:
    names = Webhook.model_fields.keys() - {"object", "disabled"}
    return {"disabled": row.disabled_at is not None, **{name: getattr(row, name) for name in names}}


def _deliveries(hooks: Webhooks, rows: list[tables.WebhookDelivery]) -> list[Delivery]:
    messages, attempts = hooks.messages(rows), hooks.attempts([row.id for row in rows])
    return [
        Delivery(
            id=row.id,
            message=row.message_id,
            type=messages[row.message_id].type,
            job=messages[row.message_id].job_id,
            status=row.status,
            attempts=row.attempts,
            next_attempt_at=row.next_attempt_at,
            delivered_at=row.delivered_at,
            created_at=row.created_at,
            log=[Attempt.model_validate(one) for one in attempts[row.id]],
        )
        for row in rows
        if row.message_id in messages  # else it was forgotten between the two looks
    ]
