"""The API starts fast: it never loads the numeric libraries, and no route is open without a key."""

import subprocess
import sys

import httpx

from tests.serving import on_sqlite

HEAVY = ("torch", "transformers", "safetensors", "celery", "numpy", "pyarrow")


def test_importing_the_api_loads_nothing_heavy(tmp_path):
    program = f"import sys, api.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    environment = {"SEUF_DATA_DIR": str(tmp_path), "SEUF_SECRET": "k7Gm2xQ9pLr4Tz8W" * 2, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@on_sqlite
def test_a_body_is_not_read_before_the_key(served):
    for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer seuf_wrong"}):
        answer = httpx.post(served.url + "/jobs", headers=headers, content=b"{ not json")
        assert answer.status_code == 401
        assert answer.json()["code"] == ("invalid_key" if "seuf" in str(headers) else "missing_key")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
