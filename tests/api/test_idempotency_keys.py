"""Idempotency-Key on every POST that creates: once, whatever is sent how often and dies when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import func, select, update

from api.idempotency import IN_FLIGHT
from store.ids import new_id
from store.keys import Keys
from store.tables import ApiKey, File, IdempotentRequest, Job, Model, OutboxMessage, Tenanted, Upload, Webhook
from tests.services import free_port, wait_until
from tests.serving import SECRET, Tenant, lines_of, on_sqlite

Send = Callable[[Tenant, str], httpx.Response]
REPLAYED = "idempotent-replayed"


def body_of_job(tenant: Tenant) -> dict[str, Any]:
    sets = {
        name: {"examples": [{"text": f"Ada {name} {n}."} for n in range(3)]}
        for name in ("forget_set", "retain_set")
    }
    return {"model": "tiny", **sets}


def post(tenant: Tenant, key: str, path: str, body: Any) -> httpx.Response:
    return tenant.http.post(path, json=body, headers={"Idempotency-Key": key})


def upload(tenant: Tenant, key: str, purpose: str = "forget") -> httpx.Response:
    parts = {"file": ("set.jsonl", "\n".join(lines_of("forget")).encode())}
    headers = {"Idempotency-Key": key}  # (httpx draws a new boundary each time)
    return tenant.http.post("/files", data={"purpose": purpose}, files=parts, headers=headers)


CREATES: dict[str, tuple[type[Tenanted], Send]] = {
    "jobs": (Job, lambda t, key: post(t, key, "/jobs", body_of_job(t))),
    "files": (File, upload),
    "uploads": (
        Upload,
        lambda t, key: post(t, key, "/uploads", {"purpose": "forget", "filename": "a.jsonl"}),
    ),
    "keys": (ApiKey, lambda t, key: post(t, key, "/keys", {"name": "k", "scopes": ["jobs:read"]})),
    "webhooks": (
        Webhook,
        lambda t, key: post(t, key, "/webhooks", {"url": "https://1.1.1.1/in", "events": ["job.succeeded"]}),
    ),
}


def count(tenant: Tenant, table: type[Tenanted]) -> int:
    with tenant.served.database.read() as session:
        query = select(func.count()).select_from(table).where(table.tenant == tenant.name)
        return session.scalar(query) or 0


@pytest.fixture
def ready(tenant: Tenant, tiny_model: Path) -> Tenant:
    tenant.register(tiny_model)
    return tenant


@pytest.mark.parametrize("what", CREATES)
def test_sent_twice_it_is_created_once(ready: Tenant, what: str) -> None:
    table, send = CREATES[what]
    before, key = count(ready, table), str(uuid4())
    first, second = send(ready, key), send(ready, key)
    assert first.is_success, first.text
    assert (second.status_code, second.headers.get(REPLAYED)) == (first.status_code, "true")
    assert REPLAYED not in first.headers
    for name in ("location", "retry-after", "content-type"):
        assert second.headers.get(name) == first.headers.get(name)
    assert count(ready, table) == before + 1
    shown_once = {"keys": "token", "webhooks": "secret"}.get(what)
    if shown_once is None:
        assert second.content == first.content
        return
    again = second.json()
    assert again == {**first.json(), shown_once: None}
    with ready.served.database.read() as session:
        kept = session.get_one(IdempotentRequest, (ready.name, key))
        assert first.json()[shown_once] not in str((kept.body, kept.headers, kept.fingerprint))


def test_a_model_too(tenant: Tenant, tiny_model: Path) -> None:
    body = {"name": "tiny", "path": str(tiny_model)}
    first, second = (post(tenant, "m", "/models", body) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)  # without the key: 409 name_taken
    assert first.content == second.content
    assert count(tenant, Model) == 1


def test_every_post_that_creates_takes_one(served: Any) -> None:
    """Whoever adds such a route has to add the header (TheOnce), or to say here why it needs none."""
    document = httpx.get(served.url + "/openapi.json").json()
    creating = {
        path: any(p["name"] == "Idempotency-Key" for p in methods["post"].get("parameters", []))
        for path, methods in document["paths"].items()
        if "post" in methods
    }
    needs_none = {
        "/jobs/estimate": "creates nothing",
        "/jobs/{job_id}/cancel": "a cancelled job is cancelled",
        "/uploads/{upload_id}/complete": "an upload becomes one file, however often it is completed",
        "/webhooks/{webhook_id}/rotate-secret": "whoever did not see the secret rotates again",
        "/webhooks/{webhook_id}/test": "a message more is no harm",
        "/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": "receivers know repeated messages by their id",
    }
    assert {path for path, has in creating.items() if not has} <= needs_none.keys()


def test_another_request_under_the_same_key_is_refused(ready: Tenant) -> None:
    body = body_of_job(ready)
    assert post(ready, "k", "/jobs", body).status_code == 202
    for path, other in (
        ("/jobs", body | {"metadata": {"a": "b"}}),
        ("/keys", {"name": "k", "scopes": ["admin"]}),
    ):
        refused = post(ready, "k", path, other)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert upload(ready, "f").status_code == 201
    assert upload(ready, "f", "retain").json()["code"] == "idempotency_key_reused"
    assert (count(ready, Job), count(ready, ApiKey)) == (1, 1)


def test_a_refused_request_leaves_the_key_free(ready: Tenant) -> None:
    body = body_of_job(ready)
    wrong = [body | {"model": "nobody"}, body | {"seed": 1}, {"model": "tiny"}]
    for one in wrong:
        assert post(ready, "k", "/jobs", one).status_code == 422
    assert post(ready, "k", "/jobs", body).status_code == 202


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü"])
def test_keys_that_are_none(ready: Tenant, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode())]
    refused = ready.http.post("/keys", json={"name": "k", "scopes": ["admin"]}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_idempotency_key")
    assert refused.json()["errors"][0]["parameter"] == "Idempotency-Key"


def test_a_key_belongs_to_its_tenant(ready: Tenant, served: Any) -> None:
    assert post(ready, "k", "/keys", {"name": "k", "scopes": ["jobs:read"]}).status_code == 201
    with served.database.write() as session:
        token = Keys(session, new_id("tenant")).create("other", SECRET).token
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "k"}
    other = httpx.post(served.url + "/keys", json={"name": "k", "scopes": ["jobs:read"]}, headers=headers)
    assert (other.status_code, REPLAYED in other.headers) == (201, False)


def test_in_flight_is_409_until_it_is_taken_for_dead(ready: Tenant) -> None:
    """What a process leaves behind that dies at work: a reservation without an answer."""
    body = body_of_job(ready)
    assert post(ready, "k", "/jobs", body).status_code == 202
    database = ready.served.database
    with database.write() as session:
        session.execute(
            update(IdempotentRequest).where(IdempotentRequest.tenant == ready.name).values(status=None)
        )
    busy = post(ready, "k", "/jobs", body)
    assert (busy.status_code, busy.json()["code"]) == (409, "request_in_flight")
    assert int(busy.headers["retry-after"]) >= 1
    with database.write() as session:
        row = session.get_one(IdempotentRequest, (ready.name, "k"))
        row.created_at -= IN_FLIGHT + timedelta(seconds=1)
    assert REPLAYED not in post(ready, "k", "/jobs", body).headers
    assert post(ready, "k", "/jobs", body).headers[REPLAYED] == "true"


@pytest.mark.parametrize("what", ["jobs", "files"])
def test_requests_at_the_same_moment_create_once(ready: Tenant, what: str) -> None:
    table, send = CREATES[what]
    before, together, answers = count(ready, table), threading.Barrier(6), list[httpx.Response]()

    def ask() -> None:
        together.wait()
        answers.append(send(ready, "k"))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [answer for answer in answers if answer.is_success]
    assert {answer.status_code for answer in answers} <= {won[0].status_code, 409}
    assert len({answer.content for answer in won}) == 1
    assert sum(REPLAYED not in answer.headers for answer in won) == 1
    created = count(ready, table) - before
    assert created == 1


_KILLED = """
import os, signal, sys
import uvicorn
from api.main import app
from starlette.responses import Response
from store.idempotency import Idempotency

moment = sys.argv[2]
real = Idempotency.answer

def answer(self, *given):
    real(self, *given)
    if moment == "before the commit":
        os.kill(os.getpid(), signal.SIGKILL)

Idempotency.answer = answer
send = Response.__call__

async def sent(self, scope, receive, out):
    if moment == "after the commit" and self.status_code == 202:
        os.kill(os.getpid(), signal.SIGKILL)
    await send(self, scope, receive, out)

Response.__call__ = sent
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


@on_sqlite
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_a_killed_process_never_makes_two(ready: Tenant, moment: str) -> None:
    """A second API process on the same database is killed at the worst moments; the client asks the first one again."""
    settings, port, body = ready.served.settings, free_port(), body_of_job(ready)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SEUF_")},
        "SEUF_DATA_DIR": str(settings.data_dir),
        "SEUF_DATABASE_URL": settings.database_url,
        "SEUF_SECRET": SECRET.decode(),
    }
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(port), moment], env=environment)
    headers = {"Authorization": f"Bearer {ready.key}", "Idempotency-Key": "k"}
    try:
        wait_until(lambda: _listens(port), 30, "the second API")
        with pytest.raises(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{port}/jobs", json=body, headers=headers, timeout=20)
        assert process.wait(20) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    made = count(ready, Job)
    assert made == (1 if moment == "after the commit" else 0)
    if moment == "before the commit":
        assert post(ready, "k", "/jobs", body).status_code == 409
        with ready.served.database.write() as session:
            session.get_one(IdempotentRequest, (ready.name, "k")).created_at -= IN_FLIGHT
    answer = post(ready, "k", "/jobs", body)
    assert answer.status_code == 202
    assert (answer.headers.get(REPLAYED) == "true") == (made == 1)
    assert (count(ready, Job), count(ready, OutboxMessage)) == (1, 1)


def _listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False
