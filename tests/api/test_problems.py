"""Every error is a problem document with a request id, whatever caused it; tenants do not see each other."""

import re

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from store.ids import new_id
from store.keys import Keys
from tests.serving import SECRET


def test_problems_of_the_framework_itself(tenant):
    cases = {
        ("GET", "/nowhere"): (404, "route_not_found"),
        ("GET", "/jobs/"): (404, "route_not_found"),
        ("PUT", "/jobs"): (405, "method_not_allowed"),
        ("DELETE", "/healthz"): (405, "method_not_allowed"),
    }
    for (method, path), (status, code) in cases.items():
        answer = tenant.http.request(method, path)
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem = answer.json()
        assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
        assert problem.keys() >= {"type", "title", "status", "detail", "code", "request_id"}
        assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert tenant.http.put("/jobs").headers["Allow"] == "GET, POST"
    assert tenant.http.post("/files/file_x").headers["Allow"] == "GET, DELETE"


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 100_000, b'{"model": \xff}'])
def test_a_body_that_is_no_json(tenant, body):
    answer = tenant.http.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] in ("json_invalid", "invalid_request", "unreadable_body")


def test_request_ids_come_back_and_cannot_forge_a_log_line(tenant):
    assert tenant.http.get("/jobs", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    for given in ("two words", "x" * 200, "a\tb"):
        answer = tenant.http.get("/jobs", headers={"X-Request-Id": given})
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_a_crash_shows_its_id_and_nothing_else(served, caplog):
    app = create_app(served.settings)
    with served.database.write() as session:
        key = Keys(session, new_id("tenant")).create("test", SECRET).token

    @app.get("/crash")
    def crash():
        raise RuntimeError("password=hunter2")

    http = TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {key}"})
    answer = http.get("/crash", headers={"X-Request-Id": "find-me"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == "find-me"
    assert "hunter2" not in answer.text
    assert "GET /crash crashed" in caplog.text  # its id stands in the log too: tests/api/test_observed.py


def test_characters_that_no_id_has(tenant):
    for path in ("/jobs/%00", "/models/a%00b", "/files/%F0%9F%98%80", "/jobs?model=%00"):
        answer = tenant.http.get(path)
        assert answer.status_code in (404, 422), (path, answer.text)
        assert answer.headers["Content-Type"] == "application/problem+json"
