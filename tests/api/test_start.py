"""The API starts fast: it never loads the numeric libraries, and no route is open without a key."""

import subprocess
import sys

import httpx
import pytest

from api.app import create_app
from api.auth import PUBLIC
from api.settings import ApiSettings
from tests.serving import on_sqlite

HEAVY = ("torch", "transformers", "safetensors", "celery", "numpy", "pyarrow")


def test_importing_the_api_loads_nothing_heavy(tmp_path):
    program = f"import sys, api.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    environment = {"SEUF_DATA_DIR": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def routes(app):
    document = app.openapi()
    for path, operations in document["paths"].items():
        for method in operations:
            yield method.upper(), path


@on_sqlite
def test_every_route_needs_a_key(served):
    app = create_app(served.settings)
    walked = [(method, path) for method, path in routes(app) if path not in PUBLIC]
    assert len(walked) >= 18
    for method, path in walked:
        for headers in ({}, {"Authorization": "Bearer seuf_wrong"}, {"Authorization": "Basic eDp5"}):
            answer = httpx.request(method, served.url + path, headers=headers, content=b"{ not json")
            assert answer.status_code == 401, (method, path)
            assert answer.json()["code"] == ("invalid_key" if "seuf" in str(headers) else "missing_key") or (
                "Basic" in str(headers) and answer.json()["code"] == "invalid_key"
            )
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_health_needs_no_key(served):
    assert httpx.get(served.url + "/healthz").json()["status"] == "ok"
    ready = httpx.get(served.url + "/readyz")
    assert ready.status_code == 200, ready.text
    assert ready.json()["parts"].keys() == {"database", "storage"}
    assert httpx.get(served.url + "/openapi.json").status_code == 200


@pytest.mark.parametrize("broken", ["database", "storage", "broker"])
def test_readiness_names_the_part_that_does_not_work(tmp_path, sqlite_template, broken):
    from fastapi.testclient import TestClient

    path = tmp_path / "seuf.db"
    if broken != "database":
        path.write_bytes(sqlite_template.read_bytes())
    broker = "redis://127.0.0.1:1/0" if broken == "broker" else ""
    settings = ApiSettings(
        data_dir=tmp_path, database_url=f"sqlite:///{path}", broker_url=broker, secret="k7Gm2xQ9" * 4, lane="database"
    )
    app = create_app(settings)
    if broken == "storage":
        drafts = tmp_path / "artefacts" / ".drafts"
        drafts.rmdir()
        drafts.write_text("a file where the folder should be")
    answer = TestClient(app).get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "unready"
    assert [name for name, part in answer.json()["parts"].items() if not part["ok"]] == [broken]


def test_a_revoked_key_opens_nothing(tenant):
    from store.keys import Keys

    assert tenant.http.get("/jobs").status_code == 200
    with tenant.served.database.write() as session:
        keys = Keys(session, tenant.name)
        keys.revoke(keys.list().data[0].id)
    assert tenant.http.get("/jobs").json()["code"] == "invalid_key"
