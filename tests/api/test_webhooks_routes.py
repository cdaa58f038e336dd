"""Webhooks over HTTP: made, changed, rotated, tested, looked at, replayed, deleted; and what is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from store import webhooks
from store.sealed import Sealer
from store.tables import Webhook, WebhookMessage, now
from store.webhooks import JOB_TYPES, MAX_WEBHOOKS, Outcome
from tests.serving import SECRET, Tenant, on_sqlite

URL = "https://hooks.example.com/seuf?token=a"


def make(tenant: Tenant, **fields: Any) -> dict[str, Any]:
    answer = tenant.http.post("/webhooks", json={"url": URL, **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/webhooks/{answer.json()['id']}"
    return dict(answer.json())


def acts(tenant: Tenant) -> list[tuple[str, str]]:
    """What the audit log has of webhooks, oldest first."""
    rows = tenant.http.get("/audit", params={"limit": 100}).json()["data"]
    return [(row["what"], row["object"]) for row in reversed(rows) if row["what"].startswith("webhook")]


def send(tenant: Tenant, webhook_id: str, outcome: Outcome) -> None:
    """As the duty does it, with this outcome."""
    with tenant.served.database.write() as session:
        parcel = webhooks.take(session, webhook_id, 60)
        assert parcel is not None
        webhooks.record(session, parcel, outcome, timedelta(seconds=5), timedelta(days=5))


def test_a_webhook_from_its_first_day_to_its_last(tenant: Tenant) -> None:
    made = make(tenant, description="for the desk")
    secret = made.pop("secret")
    assert secret.startswith("whsec_")
    assert made["events"] == list(JOB_TYPES)
    assert (made["disabled"], made["failing_since"], made["previous_secret_until"]) == (False, None, None)
    here = f"/webhooks/{made['id']}"
    assert tenant.http.get(here).json() == made
    assert tenant.http.get("/webhooks").json()["data"] == [made]
    changed = tenant.http.patch(here, json={"events": ["job.failed", "job.failed"], "description": ""}).json()
    assert (changed["events"], changed["description"], changed["url"]) == (["job.failed"], "", URL)
    rotated = tenant.http.post(f"{here}/rotate-secret", json={"overlap_seconds": 60}).json()
    assert rotated["secret"] != secret
    assert rotated["previous_secret_until"] is not None
    assert tenant.http.delete(here).status_code == 204
    assert tenant.http.get(here).status_code == 404
    assert tenant.http.get("/webhooks").json()["data"] == []
    assert [what for what, object_id in acts(tenant) if object_id == made["id"]] == [
        "webhook.create",
        "webhook.update",
        "webhook.rotate_secret",
        "webhook.delete",
    ]


def test_a_secret_is_shown_once_and_kept_encrypted(tenant: Tenant) -> None:
    made = make(tenant)
    secret = made["secret"]
    shown = [tenant.http.get(path).text for path in ("/webhooks", f"/webhooks/{made['id']}", "/audit")]
    assert not any(secret in text for text in shown)
    with tenant.served.database.read() as session:
        row = session.scalars(select(Webhook).where(Webhook.id == made["id"])).one()
    assert secret not in row.secret
    assert Sealer(SECRET).open(row.secret) == secret
    rotated = tenant.http.post(f"/webhooks/{made['id']}/rotate-secret").json()
    with tenant.served.database.read() as session:
        row = session.scalars(select(Webhook).where(Webhook.id == made["id"])).one()
    assert Sealer(SECRET).open(row.secret) == rotated["secret"]
    assert row.previous_secret is not None
    assert Sealer(SECRET).open(row.previous_secret) == secret
    at_once = tenant.http.post(f"/webhooks/{made['id']}/rotate-secret", json={"overlap_seconds": 0}).json()
    assert at_once["previous_secret_until"] is None


def test_deliveries_tell_how_each_attempt_went(tenant: Tenant) -> None:
    hook = make(tenant)["id"]
    asked = tenant.http.post(f"/webhooks/{hook}/test")
    assert asked.status_code == 202
    assert (asked.json()["type"], asked.json()["job"], asked.json()["status"]) == (
        "webhook.test",
        None,
        "pending",
    )
    send(tenant, hook, Outcome(now(), 15_000, None, "No answer within 15 s."))
    (delivery,) = tenant.http.get(f"/webhooks/{hook}/deliveries").json()["data"]
    assert (delivery["id"], delivery["status"], delivery["attempts"]) == (asked.json()["id"], "pending", 1)
    assert delivery["message"].startswith("msg_")
    assert delivery["next_attempt_at"] is not None
    ((attempt),) = delivery["log"]
    assert attempt.pop("at")
    assert attempt == {
        "number": 1,
        "milliseconds": 15_000,
        "status_code": None,
        "error": "No answer within 15 s.",
    }
    assert tenant.http.get(f"/webhooks/{hook}").json()["failing_since"] is not None
    again = tenant.http.post(f"/webhooks/{hook}/deliveries/{delivery['id']}/replay")
    assert again.status_code == 202
    send(tenant, hook, Outcome(now(), 12, 204))
    (delivery,) = tenant.http.get(f"/webhooks/{hook}/deliveries").json()["data"]
    assert (delivery["status"], [one["status_code"] for one in delivery["log"]]) == ("delivered", [None, 204])
    assert tenant.http.get(f"/webhooks/{hook}").json()["failing_since"] is None
    assert ("webhook.test", hook) in acts(tenant)
    assert ("webhook.replay", delivery["id"]) in acts(tenant)


def test_deliveries_come_in_pages(tenant: Tenant) -> None:
    hook = make(tenant)["id"]
    asked = [tenant.http.post(f"/webhooks/{hook}/test").json()["id"] for _ in range(3)]
    first = tenant.http.get(f"/webhooks/{hook}/deliveries", params={"limit": 2}).json()
    rest = tenant.http.get(f"/webhooks/{hook}/deliveries", params={"cursor": first["next"]}).json()
    assert [one["id"] for one in first["data"] + rest["data"]] == asked[::-1]
    assert (first["has_more"], rest["has_more"], rest["next"]) == (True, False, None)


def test_a_disabled_webhook_gets_nothing(tenant: Tenant) -> None:
    hook = make(tenant)["id"]
    waiting = tenant.http.post(f"/webhooks/{hook}/test").json()["id"]
    off = tenant.http.patch(f"/webhooks/{hook}", json={"disabled": True}).json()
    assert (off["disabled"], off["disabled_at"] is not None) == (True, True)
    (delivery,) = tenant.http.get(f"/webhooks/{hook}/deliveries").json()["data"]
    assert delivery["status"] == "failed"
    for path in (f"/webhooks/{hook}/test", f"/webhooks/{hook}/deliveries/{waiting}/replay"):
        answer = tenant.http.post(path)
        assert (answer.status_code, answer.json()["code"]) == (409, "webhook_disabled")
    assert tenant.http.patch(f"/webhooks/{hook}", json={"disabled": False}).json()["disabled"] is False
    assert tenant.http.post(f"/webhooks/{hook}/deliveries/{waiting}/replay").status_code == 202


def test_deleting_takes_deliveries_along(tenant: Tenant) -> None:
    """And leaves those of other webhooks, which were told the same."""
    first, second = make(tenant)["id"], make(tenant)["id"]
    tenant.http.post(f"/webhooks/{first}/test")
    tenant.http.post(f"/webhooks/{second}/test")
    send(tenant, first, Outcome(now(), 1, 500))
    assert tenant.http.delete(f"/webhooks/{first}").status_code == 204
    assert tenant.http.get(f"/webhooks/{first}/deliveries").status_code == 404
    assert len(tenant.http.get(f"/webhooks/{second}/deliveries").json()["data"]) == 1


@on_sqlite
@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://[::ffff:169.254.169.254]/",
        "https://user:pass@hooks.example.com/",
        "https://hooks.example.com:22/",
        "javascript:alert(1)",
    ],
)
def test_addresses_that_are_refused(tenant: Tenant, url: str) -> None:
    hook = make(tenant)["id"]
    for answer in (
        tenant.http.post("/webhooks", json={"url": url}),
        tenant.http.patch(f"/webhooks/{hook}", json={"url": url}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "receiver_refused")
        assert answer.json()["errors"][0]["pointer"] == "/url"
        assert answer.json()["fix"]
    assert tenant.http.get(f"/webhooks/{hook}").json()["url"] == URL


@on_sqlite
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": URL, "events": []}, "/events"),
        ({"url": URL, "events": ["job.paused"]}, "/events/0"),
        ({"url": URL, "secret": "whsec_mine"}, "/secret"),
        ({"url": URL + "a" * 2048}, "/url"),
        ({"url": URL, "description": "a" * 201}, "/description"),
    ],
)
def test_bodies_that_are_refused(tenant: Tenant, body: dict[str, Any], pointer: str) -> None:
    answer = tenant.http.post("/webhooks", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == pointer


@on_sqlite
def test_a_change_must_change_something(tenant: Tenant) -> None:
    hook = make(tenant)["id"]
    assert tenant.http.patch(f"/webhooks/{hook}", json={}).status_code == 422
    assert (
        tenant.http.post(f"/webhooks/{hook}/rotate-secret", json={"overlap_seconds": 700_000}).status_code
        == 422
    )


@on_sqlite
def test_there_is_a_most(tenant: Tenant) -> None:
    for _ in range(MAX_WEBHOOKS):
        make(tenant)
    answer = tenant.http.post("/webhooks", json={"url": URL})
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_webhooks")


@on_sqlite
def test_a_submitted_job_is_told(tenant: Tenant, tiny_model: Any) -> None:
    """By the route as by everything else that changes a job, with ids and codes alone."""
    hook = make(tenant)["id"]
    job = tenant.submit(tiny_model)["id"]
    tenant.http.post(f"/jobs/{job}/cancel")
    told = tenant.http.get(f"/webhooks/{hook}/deliveries").json()["data"]
    assert [(one["type"], one["job"]) for one in reversed(told)] == [
        ("job.queued", job),
        ("job.cancelled", job),
    ]
    with tenant.served.database.read() as session:
        message = session.get(WebhookMessage, told[0]["message"])
    assert message is not None
    assert message.data == {"job": job, "status": "cancelled", "seq": 2, "error_code": None}
