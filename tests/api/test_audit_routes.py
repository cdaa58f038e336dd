"""The audit log over HTTP, and that the client can check it with nothing but the export and the key."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from client import Client
from store import chain, signing
from store.audit import Audit
from store.tables import now
from tests.serving import Tenant, on_sqlite


def sign(tenant: Tenant) -> None:
    """As the duty does when it is due."""
    key = signing.private_key(tenant.served.settings)
    assert key is not None
    with tenant.served.database.write() as session:
        Audit(session, tenant.name).sign(key)


def test_acts_are_listed_with_who_and_which_request(tenant: Tenant) -> None:
    uploaded = tenant.upload("forget")["id"]
    answer = tenant.http.delete(f"/files/{uploaded}", headers={"X-Request-Id": "req-of-the-test"})
    assert answer.status_code == 204
    rows = tenant.http.get("/audit").json()["data"]
    assert [(row["what"], row["object"]) for row in rows] == [
        ("file.delete", uploaded),
        ("file.create", uploaded),
    ]
    assert rows[0]["request_id"] == "req-of-the-test"
    assert rows[0]["who"].startswith("key_")
    assert rows[0]["previous_hash"] == rows[1]["hash"]
    assert chain.Row(**rows[0]).computed() == rows[0]["hash"]  # as it is shown it can be hashed


def test_filters_and_pages(tenant: Tenant) -> None:
    first, second = (tenant.upload("forget")["id"] for _ in range(2))

    def found(**query: Any) -> list[tuple[str, str]]:
        answer = tenant.http.get("/audit", params=query)
        assert answer.status_code == 200, answer.text
        return [(row["what"], row["object"]) for row in answer.json()["data"]]

    assert found(object=first) == [("file.create", first)]
    assert found(what="file.create") == [("file.create", second), ("file.create", first)]
    assert found(what="file.delete") == found(who="system") == []
    assert found(since=(now() + timedelta(hours=1)).isoformat()) == []
    assert len(found(since=(now() - timedelta(hours=1)).isoformat())) == 2
    page = tenant.http.get("/audit", params={"limit": 1}).json()
    assert page["has_more"]
    rest = tenant.http.get("/audit", params={"limit": 1, "cursor": page["next"]}).json()
    assert [row["object"] for row in page["data"] + rest["data"]] == [second, first]
    assert not rest["has_more"]


@on_sqlite
@pytest.mark.parametrize(
    "query",
    [{"cursor": "x"}, {"cursor": "9" * 30}, {"since": "2026-11-24T06:00:00"}, {"who": "a" * 65}, {"by": "x"}],
)
def test_queries_that_are_refused(tenant: Tenant, query: dict[str, str]) -> None:
    answer = tenant.http.get("/audit", params=query)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] in query


def test_an_export_is_checked_with_the_key_alone(tenant: Tenant) -> None:
    tenant.upload("forget")
    sign(tenant)
    tenant.upload("retain")
    key = tenant.http.get("/audit/key").json()
    answer = tenant.http.get("/audit/export")
    assert answer.headers["content-type"].startswith("application/jsonl")
    lines = answer.content.splitlines()
    found = chain.verify(lines, trusted={key["key_id"]}, now=now())
    assert (found.tenant, found.rows, found.heads, found.unsigned) == (tenant.name, 3, 1, 1)
    (head,) = tenant.http.get("/audit/heads").json()["data"]
    assert {"head": head} == json.loads(lines[-1])
    assert chain.Head(**head).is_signed()
    assert key["pem"].startswith("-----BEGIN PUBLIC KEY-----")


def test_nothing_was_done_yet(tenant: Tenant) -> None:
    answer = tenant.http.get("/audit/export")
    assert (answer.status_code, answer.content) == (200, b"")
    assert tenant.http.get("/audit/heads").json()["data"] == []


@on_sqlite
def test_the_client_has_all_of_it(tenant: Tenant) -> None:
    for _ in range(2):
        tenant.upload("forget")
        sign(tenant)
    with Client(tenant.served.url, tenant.key) as seuf:
        lines = [*seuf.audit.export(), *(json.dumps({"head": one}).encode() for one in seuf.audit.heads())]
        trusted = {seuf.audit.key()["key_id"]}
        assert seuf.audit.rows(what="audit.sign", limit=1)["data"][0]["seq"] == 4
    found = chain.verify(lines, trusted=trusted, all_heads=True)
    assert (found.rows, found.heads) == (4, 2)


@on_sqlite
def test_an_export_of_many_pages(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    from api import audit

    monkeypatch.setattr(audit, "_ROWS", 2)
    for _ in range(5):
        tenant.upload("forget")
    sign(tenant)
    key = tenant.http.get("/audit/key").json()["key_id"]
    lines = tenant.http.get("/audit/export").content.splitlines()
    assert (len(lines), chain.verify(lines, trusted={key}).rows) == (7, 6)
