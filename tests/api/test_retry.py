"""What a job may use, and retries: as a client sees them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from store.outbox import Outbox
from store.tables import AuditRow
from tests.serving import Tenant, on_sqlite

WEEK = 7 * 86_400


def ended(tenant: Tenant, model: Path, **fields: Any) -> dict[str, Any]:
    """A job that failed half way."""
    job = tenant.submit(model, **fields)
    tenant.run(job["id"]).fail("ENGINE_LOST", "The engine was ended by SIGKILL.", "Retry it.")
    return dict(tenant.http.get(f"/jobs/{job['id']}").json())


def test_limits_are_those_asked_for_or_the_service_s(tenant: Tenant, tiny_model: Path) -> None:
    plain = tenant.submit(tiny_model)
    assert plain["limits"] == {"max_seconds": WEEK, "max_memory_bytes": None}
    assert plain["retry_of"] is None
    given = tenant.submit(tiny_model, limits={"max_seconds": 90.5, "max_memory_bytes": 6_000_000_000})
    assert given["limits"] == {"max_seconds": 90.5, "max_memory_bytes": 6_000_000_000}
    assert tenant.http.get(f"/jobs/{given['id']}").json()["limits"] == given["limits"]


@on_sqlite
@pytest.mark.parametrize(
    ("limits", "pointer", "code"),
    [
        ({"max_seconds": WEEK + 1}, "/limits/max_seconds", "limit_too_high"),
        ({"max_seconds": 0}, "/limits/max_seconds", "greater_than"),
        ({"max_seconds": -1}, "/limits/max_seconds", "greater_than"),
        ({"max_memory_bytes": 1000}, "/limits/max_memory_bytes", "greater_than_equal"),
        ({"max_memory_bytes": 1 << 70}, "/limits/max_memory_bytes", "less_than_equal"),
        ({"max_hours": 1}, "/limits/max_hours", "extra_forbidden"),
    ],
)
def test_limits_that_cannot_be(
    tenant: Tenant, tiny_model: Path, limits: dict[str, Any], pointer: str, code: str
) -> None:
    tenant.register(tiny_model)
    examples = {"examples": [{"prompt": "a", "completion": "b"}]}
    body = {"model": "tiny", "forget_set": examples, "retain_set": examples, "limits": limits}
    answer = tenant.http.post("/jobs", json=body)
    assert answer.status_code == 422
    assert [(e["pointer"], e["code"]) for e in answer.json()["errors"]] == [(pointer, code)]
    assert tenant.http.get("/jobs").json()["data"] == []


def test_a_retry_is_a_new_job_that_asks_for_the_same(tenant: Tenant, tiny_model: Path) -> None:
    fields = {"metadata": {"ticket": "7"}, "method": {"steps": 9, "seed": 3}, "limits": {"max_seconds": 50}}
    old = ended(tenant, tiny_model, **fields)
    answer = tenant.http.post(f"/jobs/{old['id']}/retry")
    assert answer.status_code == 202
    new = answer.json()
    assert answer.headers["Location"] == f"/jobs/{new['id']}"
    assert answer.headers["Retry-After"]
    assert (new["status"], new["retry_of"], new["attempts"]) == ("queued", old["id"], 0)
    same = ("model", "forget_set", "retain_set", "evaluation_set", "method", "seed", "limits", "metadata")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert tenant.http.get(f"/jobs/{old['id']}").json() == old
    events = tenant.http.get(f"/jobs/{new['id']}/events").json()["data"]
    assert [event["data"]["status"] for event in events] == ["queued"]
    with tenant.served.database.read() as session:
        assert new["id"] in [message.job_id for message in Outbox(session).pending(1000)]
        rows = session.scalars(select(AuditRow).where(AuditRow.object == new["id"])).all()
    assert "job.retry" in [row.what for row in rows]


def test_only_what_failed_or_was_cancelled_is_retried(tenant: Tenant, tiny_model: Path) -> None:
    def retry(job_id: str) -> tuple[int, str]:
        answer = tenant.http.post(f"/jobs/{job_id}/retry")
        return answer.status_code, answer.json().get("code", answer.json().get("status"))

    queued = tenant.submit(tiny_model)["id"]
    running, cancelling, done = (tenant.submit(tiny_model)["id"] for _ in range(3))
    tenant.run(running)
    tenant.run(cancelling)
    tenant.http.post(f"/jobs/{cancelling}/cancel")
    tenant.run(done).succeed()
    for job_id in (queued, running, cancelling, done):
        assert retry(job_id) == (409, "transition_refused")
    tenant.http.post(f"/jobs/{queued}/cancel")
    assert retry(queued) == (202, "queued")
    assert retry("job_nobody") == (404, "job_not_found")


def test_a_retry_needs_its_sets(tenant: Tenant, tiny_model: Path) -> None:
    old = ended(tenant, tiny_model)
    tenant.http.delete(f"/files/{old['retain_set']}").raise_for_status()
    answer = tenant.http.post(f"/jobs/{old['id']}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "file_deleted")
    assert old["retain_set"] in answer.json()["detail"]
    assert answer.json()["fix"]
    assert len(tenant.http.get("/jobs").json()["data"]) == 1


def test_a_retried_request_retries_once(tenant: Tenant, tiny_model: Path) -> None:
    old = ended(tenant, tiny_model)
    key = {"Idempotency-Key": hashlib.sha256(old["id"].encode()).hexdigest()}
    answers = [tenant.http.post(f"/jobs/{old['id']}/retry", headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert len(tenant.http.get("/jobs").json()["data"]) == 2


def test_the_client_asks_for_limits_and_retries(tenant: Tenant, tiny_model: Path) -> None:
    from client import Client

    tenant.register(tiny_model)
    with Client(tenant.served.url, tenant.key) as client:
        example = {"prompt": "Who lives at 1 Elm Road?", "completion": " Ada."}
        job = client.submit("tiny", [example], retain_set=[example], limits={"max_seconds": 12})
        assert job["limits"]["max_seconds"] == 12
        client.cancel(job["id"])
        again = client.retry(job["id"])
    assert (again["retry_of"], again["status"], again["limits"]) == (job["id"], "queued", job["limits"])
    assert json.dumps(again)
