"""Webhooks of the service, for `Client.webhooks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from client.types import Page, Webhook, WebhookDelivery


class Webhooks:
    """Addresses that are told of events, and how the telling went."""

    def __init__(self, get: Callable[..., Any], change: Callable[[str, str, Any], Any]) -> None:
        self._get = get
        self._change = change

    def create(self, url: str, *, events: Sequence[str] | None = None, description: str = "") -> Webhook:
        """A new one; its `secret` (whsec_...) is in this answer and never again. Without `events`: all."""
        body: dict[str, Any] = {"url": url, "description": description}
        if events is not None:
            body["events"] = list(events)
        made: Webhook = self._change("POST", "/webhooks", body)
        return made

    def get(self, webhook_id: str) -> Webhook:
        """One webhook."""
        found: Webhook = self._get(f"/webhooks/{webhook_id}")
        return found

    def list(self, *, cursor: str | None = None, limit: int = 20) -> Page[Webhook]:
        """One page, newest first."""
        page: Page[Webhook] = self._get("/webhooks", cursor=cursor, limit=limit)
        return page

    def update(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        disabled: bool | None = None,
    ) -> Webhook:
        """Change what is given."""
        given = {"url": url, "events": events, "description": description, "disabled": disabled}
        body = {name: value for name, value in given.items() if value is not None}
        changed: Webhook = self._change("PATCH", f"/webhooks/{webhook_id}", body)
        return changed

    def delete(self, webhook_id: str) -> None:
        """Forget it and its deliveries."""
        self._change("DELETE", f"/webhooks/{webhook_id}", None)

    def rotate_secret(self, webhook_id: str, *, overlap_seconds: int | None = None) -> Webhook:
        """A new `secret`; the one before signs too for so long (default: a day)."""
        body = {} if overlap_seconds is None else {"overlap_seconds": overlap_seconds}
        changed: Webhook = self._change("POST", f"/webhooks/{webhook_id}/rotate-secret", body)
        return changed

    def test(self, webhook_id: str) -> WebhookDelivery:
        """Send a message of type webhook.test; look at `deliveries` to see how it went."""
        made: WebhookDelivery = self._change("POST", f"/webhooks/{webhook_id}/test", None)
        return made

    def deliveries(
        self, webhook_id: str, *, cursor: str | None = None, limit: int = 20
    ) -> Page[WebhookDelivery]:
        """One page of deliveries with their attempts, newest first."""
        page: Page[WebhookDelivery] = self._get(
            f"/webhooks/{webhook_id}/deliveries", cursor=cursor, limit=limit
        )
        return page

    def replay(self, webhook_id: str, delivery_id: str) -> WebhookDelivery:
        """Send it again, under the same webhook-id."""
        path = f"/webhooks/{webhook_id}/deliveries/{delivery_id}/replay"
        again: WebhookDelivery = self._change("POST", path, None)
        return again
