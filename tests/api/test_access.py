"""Keys over HTTP: what one may do, what it may hand on, when it ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from api import auth
from store.audit import Audit
from store.keys import Keys
from store.tables import now
from tests.services import wait_until
from tests.serving import SECRET, Tenant, on_sqlite


def client_of(tenant: Tenant, token: str) -> httpx.Client:
    """The same tenant with another key."""
    return httpx.Client(base_url=tenant.served.url, headers={"Authorization": f"Bearer {token}"}, timeout=20)


def key_of(tenant: Tenant, scopes: list[str], expires_at: datetime | None = None) -> tuple[str, httpx.Client]:
    """A key made beside the API, with its client."""
    with tenant.served.database.write() as session:
        made = Keys(session, tenant.name).create("k", SECRET, scopes, expires_at)
    return made.row.id, client_of(tenant, made.token)


def made_by(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/keys", json={"name": "ci", **body})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_a_key_is_made_shown_once_and_works(tenant: Tenant) -> None:
    ends = now() + timedelta(days=1)
    made = made_by(tenant.http, scopes=["jobs:read", "files:read"], expires_at=ends.isoformat())
    assert made["scopes"] == ["files:read", "jobs:read"]
    assert made["token"].startswith(made["begins"])
    with client_of(tenant, made["token"]) as http:
        assert http.get("/jobs").status_code == 200
        assert http.get("/models").status_code == 403
    shown = tenant.http.get(f"/keys/{made['id']}").json()
    assert shown == {name: value for name, value in made.items() if name != "token"}
    assert shown in tenant.http.get("/keys").json()["data"]
    with tenant.served.database.read() as session:
        last = Audit(session, tenant.name).list()[-1]
    assert (last.what, last.object) == ("key.create", made["id"])


def test_a_missing_scope_is_named_with_the_way_out(tenant: Tenant) -> None:
    _, http = key_of(tenant, ["jobs:read", "files:read"])
    answer = http.post("/models", json={"name": "m", "path": "/m"})
    assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")
    assert "models:write" in answer.json()["detail"]
    assert "files:read, jobs:read" in answer.json()["detail"]
    assert "seuf keys create --scope models:write" in answer.json()["fix"]
    assert 'scope="models:write"' in answer.headers["www-authenticate"]


def test_nobody_hands_on_more_than_they_have(tenant: Tenant) -> None:
    mine, http = key_of(tenant, ["keys:write", "keys:read", "jobs:read"])
    made_by(http, scopes=["jobs:read"])
    for more in (["jobs:write"], ["admin"], ["jobs:read", "audit:read"]):
        refused = http.post("/keys", json={"name": "x", "scopes": more})
        assert (refused.status_code, refused.json()["code"]) == (403, "missing_scope")
    # Nor takes a stronger key over by rotating it, nor shuts it out.
    strong = tenant.http.get("/keys").json()["data"][-1]
    assert strong["scopes"] == ["admin"]
    assert http.post(f"/keys/{strong['id']}/rotate", json={}).json()["code"] == "missing_scope"
    assert http.delete(f"/keys/{strong['id']}").json()["code"] == "missing_scope"
    assert tenant.http.get("/jobs").status_code == 200
    assert http.post(f"/keys/{mine}/rotate", json={}).status_code == 201


def test_nothing_outlives_the_key_that_made_it(tenant: Tenant) -> None:
    ends = now() + timedelta(hours=2)
    mine, http = key_of(tenant, ["keys:write"], ends)
    late = (ends + timedelta(seconds=1)).isoformat()
    refused = http.post("/keys", json={"name": "x", "scopes": ["keys:write"], "expires_at": late})
    assert (refused.status_code, refused.json()["code"]) == (422, "expiry_refused")
    assert http.post(f"/keys/{mine}/rotate", json={"expires_at": late}).json()["code"] == "expiry_refused"
    made = made_by(http, scopes=["keys:write"])
    assert datetime.fromisoformat(made["expires_at"]) <= ends
    forever = made_by(tenant.http, scopes=["keys:write"])
    assert http.post(f"/keys/{forever['id']}/rotate", json={}).json()["code"] == "expiry_refused"


def test_rotation_overlaps_and_then_ends(tenant: Tenant) -> None:
    old = made_by(tenant.http, scopes=["jobs:read"])
    answer = tenant.http.post(f"/keys/{old['id']}/rotate", json={"overlap_seconds": 3600})
    new = answer.json()
    assert answer.headers["location"] == f"/keys/{new['id']}"
    for token in (old["token"], new["token"]):
        with client_of(tenant, token) as http:
            assert http.get("/jobs").status_code == 200
    shown = tenant.http.get(f"/keys/{old['id']}").json()
    assert shown["rotated_to"] == new["id"]
    left = datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    again = tenant.http.post(f"/keys/{old['id']}/rotate", json={})
    assert (again.status_code, again.json()["code"]) == (409, "key_ended")


@on_sqlite
def test_a_revoked_key_stops_within_seconds(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.KEY_SECONDS <= 5
    monkeypatch.setattr(auth, "KEY_SECONDS", 0.5)
    made = made_by(tenant.http, scopes=["jobs:read"])
    with client_of(tenant, made["token"]) as http:
        assert http.get("/jobs").status_code == 200
        assert tenant.http.delete(f"/keys/{made['id']}").status_code == 204
        wait_until(lambda: http.get("/jobs").status_code == 401, 3, "the end of a revoked key")
        assert http.get("/jobs").json()["code"] == "invalid_key"
    assert tenant.http.delete(f"/keys/{made['id']}").status_code == 204
    assert tenant.http.get(f"/keys/{made['id']}").json()["revoked_at"] is not None


@on_sqlite
def test_an_expired_key_stops_at_once(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "KEY_SECONDS", 3600)  # what is known of it must not carry it over its end
    ends = now() + timedelta(seconds=1)
    _, http = key_of(tenant, ["jobs:read"], ends)
    assert http.get("/jobs").status_code == 200
    wait_until(lambda: http.get("/jobs").status_code == 401, 3, "the end of a key")
    assert now() >= ends


def test_a_known_key_needs_no_look_in_the_database(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    real = auth.KeyMiddleware._find
    monkeypatch.setattr(auth.KeyMiddleware, "_find", lambda self, t: looks.append(t) or real(self, t))
    monkeypatch.setattr(auth, "KEY_SECONDS", 3600)
    _, http = key_of(tenant, ["jobs:read"])
    for _ in range(5):
        assert http.get("/jobs").status_code == 200
    assert len(looks) == 1
