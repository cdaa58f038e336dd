"""GET /metrics: the service in numbers, for Prometheus.

Figures of jobs and storage come from the database, so every API process says the same; those of requests are of this
process alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Annotated, Final, cast

from fastapi import APIRouter, Header, Request, Response
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from api.context import TheCaller, needs
from api.docs import problems
from api.problems import Problem
from seuf_core.version import __version__
from store.census import Census, Durations, Ended, Watch, cumulative
from store.database import Database
from store.repository import DEFAULT_TENANT

router = APIRouter(tags=["service"])

CACHE_SECONDS: Final = 5.0
"""Two servers that scrape, or one that scrapes too often, cost the database one look in so long."""
REQUEST_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of requests, in seconds."""


class Metrics:
    """What one API process tells."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = Histogram(
            "seuf_http_request_seconds",
            "From a request to the first byte of its answer, by method, route and status; of this process.",
            ("method", "route", "status"),
            buckets=REQUEST_BOUNDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_ServiceCollector(Watch(database)))


@router.get(
    "/metrics",
    response_class=Response,
    dependencies=[needs("metrics:read")],
    responses={
        200: {"content": {"text/plain": {}}, "description": "The Prometheus text format, or OpenMetrics."},
        **problems(),
    },
)
def metrics(
    request: Request, caller: TheCaller, accept: Annotated[str, Header(include_in_schema=False)] = ""
) -> Response:
    """The service in numbers, all tenants together: the queue, jobs, storage, webhooks, audit, and this process.

    For Prometheus. Give its scrape configuration a key of the scope `metrics:read`, of the tenant `default`: these are
    the operator's figures, so no other tenant's key reads them.
    """
    if caller.tenant != DEFAULT_TENANT:
        raise Problem(
            403,
            "operators_only",
            "These figures are of all tenants together, so only keys of the tenant default read them.",
            "Use a key that the operator made: seuf keys create --scope metrics:read",
        )
    encode, content_type = choose_encoder(accept)
    told = cast("Metrics", request.app.state.metrics)
    return Response(
        encode(told.registry), headers={"Content-Type": content_type, "Cache-Control": "no-store"}
    )


class _ServiceCollector(Collector):
    """The figures of the database, at most CACHE_SECONDS old."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lock = threading.Lock()
        self._seen: tuple[Census, Ended] | None = None
        self._seen_at = 0.0

    def collect(self) -> Iterable[Metric]:
        """Every family, each named and explained."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen_at > CACHE_SECONDS:
                self._seen = self._watch.look()
                self._seen_at = time.monotonic()
            census, ended = self._seen
        yield from _now(census)
        yield from _ended(census, ended)
        yield InfoMetricFamily("seuf_build", "The version that answers.", {"version": __version__})


def _now(census: Census) -> Iterable[Metric]:
    yield _gauges("seuf_jobs", "Jobs that have not ended, by state.", "status", census.jobs)
    yield _gauge("seuf_queue_oldest_seconds", "Age of the job that has waited longest.", census.oldest_queued)
    yield _gauge("seuf_workers_busy", "Workers that hold a job.", census.busy_workers)
    yield _gauge("seuf_outbox_waiting", "Jobs that the broker has yet to be told of.", census.outbox)
    yield _gauges("seuf_stored_bytes", "Bytes that the service keeps, by kind.", "kind", census.stored_bytes)
    yield _gauges(
        "seuf_webhook_deliveries",
        "Deliveries that wait, and that were given up.",
        "status",
        census.deliveries,
    )
    yield _gauge(
        "seuf_webhook_overdue_seconds", "How long the delivery due first is overdue.", census.oldest_due
    )
    yield _gauge(
        "seuf_audit_unsigned_seconds",
        "Age of the oldest audit row no signed head covers.",
        census.oldest_unsigned,
    )
    if census.dispatcher_silent is not None:
        text = "Since a dispatcher last had its duties; 0: one has them now."
        yield _gauge("seuf_dispatcher_silent_seconds", text, census.dispatcher_silent)


def _ended(census: Census, ended: Ended) -> Iterable[Metric]:
    text = "From the first claim of a job to its end, by final state."
    yield _histogram("seuf_job_seconds", text, "status", ended.jobs)
    text = "Of jobs that succeeded, by phase; queued and starting come before the first."
    yield _histogram("seuf_job_phase_seconds", text, "phase", ended.phases)
    yield CounterMetricFamily("seuf_job_attempts", "Attempts of the jobs that have ended.", ended.attempts)
    yield CounterMetricFamily(
        "seuf_job_lost_leases",
        "How often the worker of a job fell silent.",
        census.lost_leases + ended.lost_leases,
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _gauges(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, label: str, values: dict[str, Durations]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for key, durations in sorted(values.items()):
        family.add_metric([key], cumulative(durations), durations.total)
    return family
