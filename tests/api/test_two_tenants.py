"""Two tenants over every route, and every route with every key: whoever adds a route has to say here how to try it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import params
from sqlalchemy import select

from api.app import create_app
from api.auth import PUBLIC
from store.database import Database
from store.ids import new_id, random_base32
from store.keys import Keys
from store.repository import DEFAULT_TENANT
from store.scopes import ADMIN, SCOPES
from store.tables import Base, Tenanted
from tests.serving import SECRET, Served, Tenant, finish, lines_of, on_sqlite

Operation = tuple[str, str]  # verb, path
MARK = f"mark{random_base32(12)}"
"""In every text of the other tenant: whoever sees it has seen too much."""


@dataclass(frozen=True)
class Theirs:
    """A tenant with one of everything, by the name of its path parameter."""

    tenant: Tenant
    ids: dict[str, str]

    def secrets(self) -> set[str]:
        """What nobody else may see."""
        ids = {value for name, value in self.ids.items() if name not in ("number", "name")}
        return {MARK, self.tenant.name, *ids}


@pytest.fixture
def theirs(tenant: Tenant, tiny_model: Path, tmp_path: Path) -> Theirs:
    """The tenant of the fixture, as the owner of everything."""
    model = tenant.register(tiny_model, f"model-{MARK}")
    parts = {"file": (f"{MARK}.jsonl", "\n".join(lines_of("forget")).encode())}
    file = _created(tenant.http.post("/files", data={"purpose": "forget"}, files=parts))
    upload = _created(tenant.http.post("/uploads", json={"purpose": "forget", "filename": f"{MARK}.jsonl"}))
    _created(tenant.http.put(f"/uploads/{upload['id']}/parts/1", content=b'{"text": "a"}\n'))
    body = {
        "model": model["id"],
        "forget_set": {"file": file["id"]},
        "retain_set": {"file": tenant.upload("retain")["id"]},
        "metadata": {"ticket": MARK},
    }
    jobs = [_created(tenant.http.post("/jobs", json=body)) for _ in range(2)]
    held = tenant.run(jobs[0]["id"])
    checkpoint = finish(
        tenant.served, held, tmp_path / "made", {"w.safetensors": b"0", "delta.safetensors": b"1"}
    )
    hook = _created(
        tenant.http.post("/webhooks", json={"url": f"https://1.1.1.1/{MARK}", "events": ["job.succeeded"]})
    )
    delivery = _created(tenant.http.post(f"/webhooks/{hook['id']}/test"))
    key = _created(tenant.http.post("/keys", json={"name": MARK, "scopes": ["jobs:read"]}))
    ids = {
        "file_id": file["id"],
        "upload_id": upload["id"],
        "number": "1",
        "id_or_name": model["id"],
        "job_id": jobs[0]["id"],
        "checkpoint_id": checkpoint,
        "name": "w.safetensors",
        "webhook_id": hook["id"],
        "delivery_id": delivery["id"],
        "key_id": key["id"],
    }
    return Theirs(tenant, ids)


@pytest.fixture
def ours(served: Served) -> Iterator[httpx.Client]:
    """Another tenant that may do everything."""
    with _client(served, new_id("tenant"), [ADMIN]) as http:
        yield http


def _client(served: Served, tenant: str, scopes: list[str]) -> httpx.Client:
    with served.database.write() as session:
        token = Keys(session, tenant).create("ours", SECRET, scopes).token
    return httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {token}"}, timeout=20)


def _created(answer: httpx.Response) -> dict[str, Any]:
    assert answer.is_success, answer.text
    return dict(answer.json())


OPERATORS = {"/metrics"}
"""Shows all tenants together, so no tenant but the operator's gets it at all."""


def body_of(operation: Operation, ids: dict[str, str]) -> dict[str, Any]:
    """The arguments of a request that names what `ids` holds wherever it can."""
    job = {
        "model": ids["id_or_name"],
        "forget_set": {"file": ids["file_id"]},
        "retain_set": {"examples": [{"text": "Bo."}]},
    }
    bodies: dict[Operation, dict[str, Any]] = {
        ("post", "/files"): {"data": {"purpose": "forget"}, "files": {"file": ("a.jsonl", b'{"text": "a"}')}},
        ("post", "/uploads"): {"json": {"purpose": "forget", "filename": "a.jsonl"}},
        ("put", "/uploads/{upload_id}/parts/{number}"): {"content": b"{}"},
        ("post", "/models"): {"json": {"name": "ours", "path": "/nowhere"}},
        ("post", "/jobs"): {"json": job},
        ("post", "/jobs/estimate"): {"json": job},
        ("post", "/webhooks"): {"json": {"url": "https://1.1.1.1/in", "events": ["job.failed"]}},
        ("patch", "/webhooks/{webhook_id}"): {"json": {"description": "ours"}},
        ("post", "/webhooks/{webhook_id}/rotate-secret"): {"json": {"overlap_seconds": 0}},
        ("post", "/keys"): {"json": {"name": "ours", "scopes": ["jobs:read"]}},
        ("post", "/keys/{key_id}/rotate"): {"json": {}},
    }
    return bodies[operation]


def test_nothing_of_another_tenant_is_seen_or_changed(theirs: Theirs, ours: httpx.Client) -> None:
    database, before = theirs.tenant.served.database, _rows(theirs)
    nobody = {name: _like(value) for name, value in theirs.ids.items()}
    with httpx.Client(base_url=ours.base_url, headers=theirs.tenant.http.headers, timeout=20) as owner:
        for operation, spec in _operations(theirs.tenant.served).items():
            verb, path = operation
            answer, nothing = (_ask(ours, operation, spec, ids) for ids in (theirs.ids, nobody))
            _is_silent(operation, answer, theirs)
            # To us it is as if it were not there: not one byte tells that it is.
            assert _plain(answer, theirs.ids) == _plain(nothing, nobody), operation
            if _named(path):
                assert answer.status_code == 404, (operation, answer.text)
            elif path in OPERATORS:
                assert answer.json()["code"] == "operators_only", (operation, answer.text)
            elif verb == "get":
                assert answer.status_code == 200, (operation, answer.text)
            if verb == "get" and path not in OPERATORS:  # and it is there
                assert _ask(owner, operation, spec, theirs.ids).is_success, operation
    assert _rows(theirs) == before
    assert database is theirs.tenant.served.database


def test_names_and_filters_of_another_tenant_find_nothing(theirs: Theirs, ours: httpx.Client) -> None:
    name = f"model-{MARK}"
    assert ours.get(f"/models/{name}").status_code == 404
    for query in (f"model={name}", f"model={theirs.ids['id_or_name']}", "status=queued", "limit=100"):
        assert ours.get(f"/jobs?{query}").json()["data"] == [], query
    for path in ("/files", "/jobs", "/models", "/keys", "/uploads", "/webhooks"):
        theirs.tenant.http.get(path)
        page = theirs.tenant.http.get(path, params={"limit": 1}).json()
        assert page["data"], path
        if page["next"]:  # a cursor of theirs leads nowhere either
            ours_page = ours.get(path, params={"cursor": page["next"]})
            assert ours_page.json()["data"] in ([], ours.get(path).json()["data"]), path


@on_sqlite
def test_every_route_with_every_scope(served: Served) -> None:
    clients = {scope: _client(served, DEFAULT_TENANT, [scope]) for scope in SCOPES}
    routes = _routes(served)
    for (verb, path), (needed,) in routes.items():
        here = re.sub(r"\{[^}]+\}", "1", path)
        for scope, http in clients.items():
            answer = http.request(verb, here)
            may = scope in (needed, ADMIN)
            assert (answer.status_code == 403) != may, (verb, path, scope, answer.text)
            assert answer.status_code != 401
            if not may and verb != "head":
                assert answer.json()["code"] == "missing_scope"
                assert needed in answer.json()["detail"]
    assert {needed for (needed,) in routes.values()} == SCOPES.keys() - {ADMIN}
    for http in clients.values():
        http.close()


@on_sqlite
def test_every_route_has_one_scope_and_openapi_shows_it(served: Served) -> None:
    routes, document = _routes(served), create_app(served.settings).openapi()
    for path, methods in document["paths"].items():
        for verb, spec in methods.items():
            if path in PUBLIC:
                assert "security" not in spec, path
                continue
            (held,) = routes.pop((verb, path))
            assert spec["security"] == [{"HTTPBearer": [held]}], (verb, path)
            assert {"401", "403", "429"} <= spec["responses"].keys(), (verb, path)
    assert {verb for verb, _ in routes} <= {"head"}  # the rest is what OpenAPI does not show


@on_sqlite
def test_without_a_key_there_is_only_what_is_public(served: Served) -> None:
    for verb, path in _routes(served):
        answer = httpx.request(verb, served.url + re.sub(r"\{[^}]+\}", "1", path))
        assert answer.status_code == 401, (verb, path)
    assert httpx.get(served.url + "/nowhere").status_code == 401
    for path in PUBLIC:
        assert httpx.get(served.url + path).status_code == 200


def _operations(served: Served) -> dict[Operation, dict[str, Any]]:
    """Those that need a key. What has side effects on the caller's own things comes last."""
    paths = create_app(served.settings).openapi()["paths"]
    found = {(verb, path): spec for path, methods in paths.items() for verb, spec in methods.items()}
    return {one: found[one] for one in sorted(found, key=lambda one: one[0]) if one[1] not in PUBLIC}


def _routes(served: Served) -> dict[Operation, list[str]]:
    """Every route behind the door, HEAD ones too, with the scopes that it names."""
    found = {}
    for part in create_app(served.settings).routes:
        for route in getattr(getattr(part, "original_router", None), "routes", ()):
            if route.path in PUBLIC:
                continue
            named = [
                scope
                for one in route.dependencies
                if isinstance(one, params.Security)
                for scope in one.scopes
            ]
            for verb in route.methods:
                found[verb.lower(), route.path_format] = named
    return found


def _named(path: str) -> list[str]:
    return re.findall(r"\{([^}]+)\}", path)


def _like(value: str) -> str:
    """An id of the same kind that nobody has; what is no id stays."""
    return new_id(value.partition("_")[0]) if "_" in value else value


def _ask(
    http: httpx.Client, operation: Operation, spec: dict[str, Any], ids: dict[str, str]
) -> httpx.Response:
    verb, path = operation
    body = body_of(operation, ids) if "requestBody" in spec else {}
    return http.request(verb, path.format(**{name: ids[name] for name in _named(path)}), **body)


def _is_silent(operation: Operation, answer: httpx.Response, theirs: Theirs) -> None:
    told = answer.text + str(answer.headers)
    sent = b"" if "multipart" in answer.request.headers.get("content-type", "") else answer.request.content
    asked = str(answer.request.url) + sent.decode("utf-8", "replace")
    for secret in theirs.secrets():
        # An id that we named ourselves may come back in the message that there is no such thing.
        assert secret not in told or secret in asked, (operation, secret, told)
    if not answer.is_success:
        assert MARK not in told


def _plain(answer: httpx.Response, ids: dict[str, str]) -> tuple[int, str, list[str]]:
    """Status, body and names of headers, without what differs from request to request."""
    text = answer.text
    for name, value in ids.items():
        if "_" in value:
            text = text.replace(value, name)
    if answer.is_success:  # our own things, each time another one
        text = ""
    text = re.sub(r'"request_id":"[^"]*"', "", text)
    return answer.status_code, text, sorted(set(answer.headers) - {"content-length", "date"})


def _rows(theirs: Theirs) -> dict[str, list[tuple[Any, ...]]]:
    database: Database = theirs.tenant.served.database
    mine = [mapper.class_ for mapper in Base.registry.mappers if issubclass(mapper.class_, Tenanted)]
    with database.read() as session:
        return {
            table.__tablename__: sorted(
                (
                    tuple(row)
                    for row in session.execute(
                        select(*table.__table__.columns).where(table.tenant == theirs.tenant.name)
                    )
                ),
                key=str,
            )
            for table in mine
        }
