"""Webhooks: who is told of what, and how the telling went.

What there is to tell is written in the transaction of the event itself (store.events.append calls `tell`), so a
message exists exactly when its event does. Sending it is worker.webhooks.

Locks are taken in one order: webhook, deliveries, audit chain.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import Session

from store.audit import SYSTEM, Audit
from store.errors import TooManyWebhooksError, WebhookDisabledError
from store.ids import new_id
from store.repository import Page, Repository
from store.tables import Webhook, WebhookAttempt, WebhookDelivery, WebhookMessage, now
from store.transitions import Status

JOB_TYPES: Final = tuple(f"job.{status.value}" for status in Status)
TEST: Final = "webhook.test"
MAX_WEBHOOKS: Final = 20
"""Of a tenant: each job's every state is written once for each of them."""
SHOWN_ATTEMPTS: Final = 20
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
GONE: Final = 410
"""The answer of a receiver that wants nothing any more."""


class Webhooks(Repository):
    """The webhooks of one tenant."""

    def create(self, url: str, description: str, events: Sequence[str], secret: str) -> Webhook:
        """A new one; `secret` is encrypted already (store.sealed). TooManyWebhooksError past MAX_WEBHOOKS."""
        counted = select(func.count()).select_from(self._select(Webhook).subquery())
        if self.session.scalar(counted) >= MAX_WEBHOOKS:  # type: ignore[operator]  # count is never null
            raise TooManyWebhooksError(
                f"There are {MAX_WEBHOOKS} webhooks already, which is the most.",
                "Delete one that is not used.",
            )
        row = Webhook(id=new_id("wh"), url=url, description=description, events=list(events), secret=secret)
        self._add(row)
        return row

    def get(self, webhook_id: str) -> Webhook:
        """The webhook, or NotFoundError."""
        return self._one(self._select(Webhook).where(Webhook.id == webhook_id), "webhook", webhook_id)

    def held(self, webhook_id: str) -> Webhook:
        """The same, for a caller that changes it: others who do so wait."""
        query = self._select(Webhook).where(Webhook.id == webhook_id).with_for_update(key_share=True)
        return self._one(query.execution_options(populate_existing=True), "webhook", webhook_id)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[Webhook]:
        """Newest first."""
        return self._page(self._select(Webhook), Webhook, cursor, limit)

    def rotate(self, webhook_id: str, secret: str, overlap: timedelta) -> Webhook:
        """A new encrypted secret; the one before signs too for so long (zero: not at all)."""
        row = self.held(webhook_id)
        row.previous_secret = row.secret if overlap else None
        row.previous_secret_until = now() + overlap if overlap else None
        row.secret = secret
        self.session.flush()
        return row

    def enable(self, row: Webhook) -> None:
        """Send again from now on; what was given up stays so until it is replayed."""
        row.disabled_at = row.failing_since = None
        self.session.flush()

    def disable(self, row: Webhook) -> None:
        """Send nothing any more; what is on its way is given up."""
        row.disabled_at = row.disabled_at or now()
        self.session.execute(
            self._update(WebhookDelivery)
            .where(WebhookDelivery.webhook_id == row.id, WebhookDelivery.status == PENDING)
            .values(status=FAILED, next_attempt_at=None)
        )
        self.session.flush()

    def delete(self, webhook_id: str) -> None:
        """Forget it, its deliveries and their attempts. NotFoundError if there is none."""
        query = self._select(Webhook).where(Webhook.id == webhook_id).with_for_update()
        row = self._one(query, "webhook", webhook_id)
        deliveries = select(WebhookDelivery.id).where(WebhookDelivery.webhook_id == webhook_id)
        self.session.execute(self._delete(WebhookAttempt).where(WebhookAttempt.delivery_id.in_(deliveries)))
        self.session.execute(self._delete(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id))
        self.session.delete(row)
        self.session.flush()

    def test(self, webhook_id: str) -> WebhookDelivery:
        """A message of type TEST to this webhook alone, on the road that every other takes."""
        row = self._enabled(webhook_id)
        message = WebhookMessage(id=new_id("msg"), type=TEST, data={"webhook": row.id})
        self._add(message)
        return self._deliver(row.id, message.id)

    def deliveries(
        self, webhook_id: str, cursor: str | None = None, limit: int = 20
    ) -> Page[WebhookDelivery]:
        """Newest first. NotFoundError for a webhook that is not there."""
        self.get(webhook_id)
        query = self._select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
        return self._page(query, WebhookDelivery, cursor, limit)

    def messages(self, deliveries: Collection[WebhookDelivery]) -> Mapping[str, WebhookMessage]:
        """What each of them tells, by message id."""
        ids = {delivery.message_id for delivery in deliveries}
        query = self._select(WebhookMessage).where(WebhookMessage.id.in_(ids))
        return {row.id: row for row in self.session.scalars(query)}

    def attempts(self, delivery_ids: Collection[str]) -> Mapping[str, Sequence[WebhookAttempt]]:
        """How each of them went, oldest attempt first, the newest SHOWN_ATTEMPTS of each."""
        query = self._select(WebhookAttempt).where(WebhookAttempt.delivery_id.in_(delivery_ids))
        found: dict[str, list[WebhookAttempt]] = {delivery_id: [] for delivery_id in delivery_ids}
        for row in self.session.scalars(query.order_by(WebhookAttempt.number)):
            found[row.delivery_id].append(row)
        return {delivery_id: rows[-SHOWN_ATTEMPTS:] for delivery_id, rows in found.items()}

    def replay(self, webhook_id: str, delivery_id: str) -> WebhookDelivery:
        """Send a delivery again now, whatever became of it, under the id it had. Its retries go on where they were."""
        self._enabled(webhook_id)
        query = self._select(WebhookDelivery).where(
            WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.id == delivery_id
        )
        row = self._one(query.with_for_update(), "delivery", delivery_id)
        row.status, row.next_attempt_at = PENDING, now()
        self.session.flush()
        return row

    def _enabled(self, webhook_id: str) -> Webhook:
        row = self.held(webhook_id)
        if row.disabled_at is not None:
            raise WebhookDisabledError(
                f"{webhook_id} is disabled, so nothing is sent to it.",
                f'Enable it first: PATCH /webhooks/{webhook_id} with {{"disabled": false}}.',
            )
        return row

    def _deliver(self, webhook_id: str, message_id: str) -> WebhookDelivery:
        row = WebhookDelivery(
            id=new_id("del"),
            webhook_id=webhook_id,
            message_id=message_id,
            status=PENDING,
            attempts=0,
            next_attempt_at=now(),
        )
        self._add(row)
        return row


def tell(session: Session, tenant: str, job_id: str, seq: int, data: Mapping[str, Any]) -> None:
    """Event `seq` of a job is a change of its state: write it down for every webhook that wants it.

    Only ids, the state and codes leave the service, never a message that might quote something.
    """
    type_ = f"job.{data['status']}"
    hooks = select(Webhook).where(Webhook.tenant == tenant, Webhook.disabled_at.is_(None))
    # Held against deletion until our rows, which refer to it, are committed. One that is being deleted is passed
    # over: waiting for it could end in a deadlock over the audit chain.
    hooks = hooks.with_for_update(read=True, key_share=True, skip_locked=True)
    wanting = [hook for hook in session.scalars(hooks) if type_ in hook.events]
    if not wanting:
        return
    told = {"job": job_id, "status": str(data["status"]), "seq": seq, "error_code": data.get("code")}
    message = WebhookMessage(id=new_id("msg"), tenant=tenant, job_id=job_id, seq=seq, type=type_, data=told)
    session.add(message)
    session.flush()
    ours = Webhooks(session, tenant)
    for hook in wanting:
        ours._deliver(hook.id, message.id)


@dataclass(frozen=True)
class Parcel:
    """One message to one webhook, taken to be sent: attempt `number`. Secrets are still encrypted."""

    delivery_id: str
    number: int
    tenant: str
    webhook_id: str
    url: str
    secrets: tuple[str, ...]
    message_id: str
    type: str
    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How an attempt went: the status of the answer, or why there was none."""

    at: datetime
    milliseconds: int
    status_code: int | None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        """Did the receiver take it?"""
        return self.status_code is not None and 200 <= self.status_code < 300


def due(session: Session, busy: Collection[str], limit: int) -> Sequence[str]:
    """Webhooks of any tenant that have a message to be sent now, the one that waits longest first; none of `busy`."""
    longest = func.min(WebhookDelivery.next_attempt_at)
    query = (
        select(WebhookDelivery.webhook_id)
        .where(WebhookDelivery.status == PENDING, WebhookDelivery.next_attempt_at <= now())
        .where(WebhookDelivery.webhook_id.not_in(busy))
        .group_by(WebhookDelivery.webhook_id)
        .order_by(longest, WebhookDelivery.webhook_id)
        .limit(limit)
    )
    return session.scalars(query).all()


def take(session: Session, webhook_id: str, hold_seconds: float) -> Parcel | None:
    """The message of this webhook that waits longest. Nobody else takes it for so long: a sender that is killed
    before it records how it went leaves it to be sent again.
    """
    at = now()
    first = (
        select(WebhookDelivery.id)
        .where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.status == PENDING)
        .where(WebhookDelivery.next_attempt_at <= at)
        .order_by(WebhookDelivery.next_attempt_at, WebhookDelivery.created_at, WebhookDelivery.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = session.scalars(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == first.scalar_subquery())
        .values(attempts=WebhookDelivery.attempts + 1, next_attempt_at=at + timedelta(seconds=hold_seconds))
        .returning(WebhookDelivery),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if row is None:
        return None
    hook = session.scalars(select(Webhook).where(Webhook.id == webhook_id)).one()
    message = session.scalars(select(WebhookMessage).where(WebhookMessage.id == row.message_id)).one()
    secrets = [hook.secret]
    if hook.previous_secret and hook.previous_secret_until and hook.previous_secret_until > at:
        secrets.append(hook.previous_secret)
    return Parcel(
        delivery_id=row.id,
        number=row.attempts,
        tenant=row.tenant,
        webhook_id=hook.id,
        url=hook.url,
        secrets=tuple(secrets),
        message_id=message.id,
        type=message.type,
        at=message.created_at,
        data=message.data,
    )


def record(
    session: Session, parcel: Parcel, outcome: Outcome, again: timedelta | None, disable_after: timedelta
) -> None:
    """Write down how an attempt went. Without success it is sent again after `again` (None: it is given up), and the
    webhook is disabled if it is gone or has failed for longer than `disable_after`.
    """
    ours = Webhooks(session, parcel.tenant)
    hook = session.scalars(
        select(Webhook).where(Webhook.id == parcel.webhook_id).with_for_update(key_share=True)
    ).one_or_none()
    row = session.scalars(
        select(WebhookDelivery).where(WebhookDelivery.id == parcel.delivery_id).with_for_update()
    ).one_or_none()
    if hook is None or row is None:
        return  # deleted meanwhile
    session.add(
        WebhookAttempt(
            tenant=parcel.tenant,
            delivery_id=row.id,
            number=parcel.number,
            at=outcome.at,
            milliseconds=outcome.milliseconds,
            status_code=outcome.status_code,
            error=outcome.error[:200] if outcome.error else None,
        )
    )
    if outcome.delivered:
        row.status, row.delivered_at, row.next_attempt_at = DELIVERED, outcome.at, None
        hook.failing_since = None
        return
    hook.failing_since = hook.failing_since or outcome.at
    if (
        row.attempts == parcel.number and row.status == PENDING
    ):  # else somebody has taken it again, or it was ended
        row.status = PENDING if again is not None else FAILED
        row.next_attempt_at = now() + again if again is not None else None
    session.flush()
    if hook.disabled_at is None and (
        outcome.status_code == GONE or outcome.at - hook.failing_since >= disable_after
    ):
        ours.disable(hook)
        Audit(session, parcel.tenant).record(SYSTEM, "webhook.disable", hook.id)


def postpone(session: Session, webhook_id: str, seconds: float) -> None:
    """What else is due for this webhook waits so long: a receiver that is down is not asked once for each message."""
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.status == PENDING)
        .where(WebhookDelivery.next_attempt_at <= now())
        .values(next_attempt_at=now() + timedelta(seconds=seconds)),
        execution_options={"synchronize_session": False},
    )


def forget(session: Session, before: datetime) -> int:
    """Delete messages older than that, and how they went, unless one is still on its way; returns how many."""
    waiting = exists().where(
        WebhookDelivery.message_id == WebhookMessage.id, WebhookDelivery.status == PENDING
    )
    old = list(
        session.scalars(
            select(WebhookMessage.id).where(WebhookMessage.created_at < before, ~waiting).limit(1000)
        )
    )
    deliveries = select(WebhookDelivery.id).where(WebhookDelivery.message_id.in_(old))
    session.execute(delete(WebhookAttempt).where(WebhookAttempt.delivery_id.in_(deliveries)))
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.message_id.in_(old)))
    session.execute(delete(WebhookMessage).where(WebhookMessage.id.in_(old)))
    return len(old)
