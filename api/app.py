"""`create_app`: the parts of the service put together."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.concurrency import run_in_threadpool

from api import (
    audit,
    checkpoints,
    estimates,
    events,
    files,
    health,
    jobs,
    keys,
    metrics,
    models,
    problems,
    ready,
    uploads,
    webhooks,
)
from api.auth import KeyMiddleware
from api.context import Service
from api.docs import openapi_with_problems
from api.feed import Feed
from api.headers import HeadersMiddleware
from api.idempotency import Replayed, replay
from api.metrics import Metrics
from api.middleware import BodyMiddleware, RequestIdMiddleware
from api.observed import PROBES, ObservedMiddleware
from api.ready import StorageProbe
from api.settings import ApiSettings
from seuf_core.version import __version__
from store import migrate
from store.artefacts import Artefacts
from store.database import AWAY, Database
from store.settings import Settings
from telemetry import tracing

log = logging.getLogger("seuf.api")

# Three inline sets and the rest of a job around them.
JSON_BYTES: Final = 3 * jobs.INLINE_BYTES + (1 << 18)
# Read as they come, under caps of their own.
STREAMED: Final = re.compile(r"/files|/uploads/[^/]+/parts/[^/]+")
_ABOUT: Final = """A service that makes Mixture-of-Experts language models forget.

Upload a forget set, submit a job, follow it, download a checkpoint with measured evidence of what it forgets
and what it keeps. Every error is a problem document (RFC 9457) with a stable `code`; lists are cursor pages.
"""


def create_app(settings: Settings) -> FastAPI:
    """The API on the database and the storage of `settings`. It does not start on a database without its tables."""
    full = settings if isinstance(settings, ApiSettings) else ApiSettings(**settings.model_dump())
    service = Service(full, Database(full.database_url), Artefacts.of(full))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(_require_tables, service.database)
        yield
        service.database.dispose()
        # Here, not at exit: uvicorn ends by the signal that stopped it, and a process that a signal ends has no exit.
        await run_in_threadpool(tracing.finish, tracing.EXIT_SECONDS)

    app = FastAPI(
        title="seuf",
        version=__version__,
        description=_ABOUT,
        lifespan=lifespan,
        redirect_slashes=False,
        swagger_ui_oauth2_redirect_url=None,
        telemetry=_telemetry(),
    )
    app.state.service = service
    app.state.metrics = Metrics(service.database)
    app.state.storage_probe = StorageProbe(service)
    app.state.feed = Feed(service.database)
    problems.install(app)
    app.add_exception_handler(Replayed, replay)
    # The last one added is the first to see a request: the id, then the body's bounds, then the key.
    app.add_middleware(KeyMiddleware, database=service.database, settings=full)
    app.add_middleware(
        BodyMiddleware, max_bytes=JSON_BYTES, streamed=STREAMED, patience=full.slow_body_seconds
    )
    app.add_middleware(ObservedMiddleware, requests=app.state.metrics.requests)
    app.add_middleware(HeadersMiddleware, hosts=full.allowed_hosts)
    app.add_middleware(RequestIdMiddleware)
    app.include_router(health.public)
    app.include_router(ready.router)
    for part in (files, uploads, models, jobs, estimates, events, checkpoints, webhooks, audit, metrics, keys, health):
        app.include_router(part.router)
    _describe(app)
    return app


def _telemetry() -> TelemetryConfig:
    """FastAPI's own spans of requests, where the process traces; no OTEL_ variable alone turns anything on."""
    return {
        "tracing": tracing.provider() is not None,
        "tracer_provider": tracing.provider(),
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"] in PROBES,
    }


def _require_tables(database: Database) -> None:
    """SchemaMismatchError ends the start. A database that is away is /readyz's to tell: it may come any moment."""
    try:
        migrate.require_head(database)
    except AWAY as error:
        log.warning("the database is away (%s)", type(error).__name__)


def _describe(app: FastAPI) -> None:
    """Put our error shape into the OpenAPI document, once."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi_with_problems(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
