"""What every answer tells browsers and caches; hosts; and that another origin is told nothing."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from api.app import create_app
from api.settings import ApiSettings
from tests.serving import SECRET, Tenant, on_sqlite, serve

pytestmark = on_sqlite


@pytest.mark.parametrize("path", ["/jobs", "/files", "/keys", "/jobs/job_nobody", "/nowhere", "/healthz"])
def test_answers_are_not_kept_sniffed_framed_or_run(tenant: Tenant, path: str) -> None:
    for http in (tenant.http, httpx.Client(base_url=tenant.served.url)):
        headers = http.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "sandbox" in policy


def test_what_may_be_kept_is_private(tenant: Tenant, tiny_model: Path) -> None:
    job = tenant.submit(tiny_model)
    assert tenant.http.get(f"/jobs/{job['id']}").headers["cache-control"] == "private, no-cache"


def test_the_documentation_still_works(tenant: Tenant) -> None:
    assert "content-security-policy" not in httpx.get(tenant.served.url + "/docs").headers


def test_another_origin_is_told_nothing(tenant: Tenant) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    for answer in (
        tenant.http.get("/jobs", headers=headers),
        tenant.http.options("/jobs", headers=headers),
        httpx.options(tenant.served.url + "/jobs", headers=headers),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.options(tenant.served.url + "/jobs", headers=headers).status_code == 401


def test_only_the_hosts_that_are_allowed(served: object, tmp_path: Path, sqlite_template: Path) -> None:
    (tmp_path / "seuf.db").write_bytes(sqlite_template.read_bytes())
    settings = ApiSettings(data_dir=tmp_path, secret=SECRET.decode(), allowed_hosts="seuf.example, 127.0.0.1")
    with serve(create_app(settings)) as address:
        for host, status in {
            "seuf.example": 200,
            "SEUF.example:8321": 200,
            "evil.example": 421,
            "seuf.example.evil.example": 421,
            "": 421,
        }.items():
            answer = httpx.get(f"{address}/healthz", headers={"Host": host})
            assert answer.status_code == status, host
        assert (
            httpx.get(f"{address}/healthz", headers={"Host": "evil.example"}).json()["code"] == "unknown_host"
        )
