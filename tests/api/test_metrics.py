"""GET /metrics as Prometheus reads it, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import Metrics
from store.keys import Keys
from tests.serving import SECRET, Served, Tenant, on_sqlite

FAMILIES = {
    "seuf_jobs": "gauge",
    "seuf_queue_oldest_seconds": "gauge",
    "seuf_workers_busy": "gauge",
    "seuf_outbox_waiting": "gauge",
    "seuf_stored_bytes": "gauge",
    "seuf_webhook_deliveries": "gauge",
    "seuf_webhook_overdue_seconds": "gauge",
    "seuf_audit_unsigned_seconds": "gauge",
    "seuf_job_seconds": "histogram",
    "seuf_job_phase_seconds": "histogram",
    "seuf_job_attempts": "counter",
    "seuf_job_lost_leases": "counter",
    "seuf_http_request_seconds": "histogram",
    "seuf_build_info": "gauge",
    "process_resident_memory_bytes": "gauge",
}


def families(text: str) -> dict[str, Any]:
    """By name, each explained."""
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in found.values())
    return found


def value(text: str, name: str, **labels: str) -> float:
    """Of the one sample that has these labels."""
    (found,) = (
        sample.value
        for family in families(text).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
    return float(found)


@pytest.fixture
def operator(served: Served) -> Iterator[httpx.Client]:
    """With a key of the tenant that may look at all of them."""
    with served.database.write() as session:
        key = Keys(session).create("prometheus", SECRET, ["metrics:read"]).token
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as http:
        yield http


def test_every_figure_is_there_in_both_formats(operator: httpx.Client) -> None:
    answer = operator.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    kinds = {name: family.type for name, family in families(answer.text).items()}
    assert FAMILIES.items() <= kinds.items()
    newer = operator.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    assert {"seuf_jobs", "seuf_build"} <= {
        family.name for family in openmetrics.text_string_to_metric_families(newer.text)
    }


def test_two_processes_say_the_same_of_the_database(tenant: Tenant, tiny_model: Any) -> None:
    tenant.submit(tiny_model)
    first, second = (generate_latest(Metrics(tenant.served.database).registry).decode() for _ in range(2))
    shared = [
        [line for line in text.splitlines() if line.startswith("seuf_") and "_seconds " not in line]
        for text in (first, second)
    ]
    assert shared[0] == shared[1]
    assert value(first, "seuf_jobs", status="queued") >= 1
    assert value(first, "seuf_stored_bytes", kind="files") > 0
    assert value(first, "seuf_outbox_waiting") >= 1


@on_sqlite
def test_requests_are_told_by_their_route(tenant: Tenant, operator: httpx.Client) -> None:
    def seen() -> float:
        text = operator.get("/metrics").text
        labels = {"method": "GET", "route": "/jobs/{job_id}", "status": "404"}
        try:
            return value(text, "seuf_http_request_seconds_count", **labels)
        except ValueError:
            return 0

    before = seen()
    for name in ("job_a", "job_b"):
        assert tenant.http.get(f"/jobs/{name}?x=1").status_code == 404
    assert seen() == before + 2
    tenant.http.get("/no/such/path")
    httpx.get(tenant.served.url + "/jobs")
    text = operator.get("/metrics").text
    routes = {sample.labels["route"] for sample in families(text)["seuf_http_request_seconds"].samples}
    assert {"/jobs/{job_id}", "none"} <= routes
    assert not any("job_a" in route or "such" in route for route in routes)


@on_sqlite
@pytest.mark.parametrize(("scopes", "status"), [(["metrics:read"], 200), (["jobs:read"], 403)])
def test_it_needs_a_scope_of_its_own(served: Served, scopes: list[str], status: int) -> None:
    with served.database.write() as session:
        key = Keys(session).create("prometheus", SECRET, scopes).token
    answer = httpx.get(served.url + "/metrics", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == status
    assert httpx.get(served.url + "/metrics").status_code == 401


@on_sqlite
def test_no_other_tenant_reads_figures_of_all(tenant: Tenant) -> None:
    answer = tenant.http.get("/metrics")
    assert answer.status_code == 403
    assert answer.json()["code"] == "operators_only"


@on_sqlite
def test_the_database_is_asked_once_in_a_while(tenant: Tenant) -> None:
    told = Metrics(tenant.served.database)
    first = generate_latest(told.registry)
    tenant.upload("forget")
    files = [
        line for line in first.decode().splitlines() if line.startswith('seuf_stored_bytes{kind="files"}')
    ]
    assert files
    assert files[0] in generate_latest(told.registry).decode()
    assert files[0] not in generate_latest(Metrics(tenant.served.database).registry).decode()
