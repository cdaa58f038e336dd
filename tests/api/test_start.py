"""The API starts fast: it never loads the numeric libraries, and no route is open without a key."""

import subprocess
import sys

import httpx

from api.app import create_app
from api.auth import PUBLIC
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


def test_a_revoked_key_opens_nothing(tenant):
    from store.keys import Keys

    assert tenant.http.get("/jobs").status_code == 200
    with tenant.served.database.write() as session:
        keys = Keys(session, tenant.name)
        keys.revoke(keys.list().data[0].id)
    assert tenant.http.get("/jobs").json()["code"] == "invalid_key"
