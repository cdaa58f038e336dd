"""What a worker and its engine tell of a job besides its rows: whose it is, in every log line, and spans of it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.leases import Claim
from store.settings import Settings
from store.tables import Job
from telemetry import logs, tracing

SEND_SECONDS = 1.0
"""What an engine waits for its last spans to be taken: the supervisor gives it two seconds to leave."""


@dataclass(frozen=True)
class Assignment:
    """An engine's job, and where it came from; handed over as one line.

    Attributes:
        traceparent: the span that the next one stands under: in the database that of the request, for the engine
            that of its supervisor.
    """

    job_id: str
    token: int
    attempt: int
    tenant: str
    request_id: str | None
    traceparent: str | None

    def line(self) -> bytes:
        """For the engine's standard input."""
        return json.dumps(asdict(self)).encode() + b"\n"


def read_line(line: str) -> Assignment:
    """The assignment of a line."""
    return Assignment(**json.loads(line))


def assignment(session: Session, claim: Claim) -> Assignment:
    """What has been claimed."""
    columns = (Job.attempts, Job.tenant, Job.request_id, Job.traceparent)
    attempt, tenant, request_id, traceparent = session.execute(
        select(*columns).where(Job.id == claim.job_id)
    ).one()
    return Assignment(claim.job_id, claim.token, attempt, tenant, request_id, traceparent)


def begin(settings: Settings, service: str) -> None:
    """Log lines and, where they are asked for, spans of this process."""
    logs.configure(settings.log_format, settings.log_level)
    if settings.tracing:
        tracing.start(service)


@contextmanager
def attempt(given: Assignment) -> Iterator[Assignment]:
    """A supervisor's attempt at a job; yields what to hand to the engine."""
    about: dict[str, str | int] = {"job.id": given.job_id, "job.attempt": given.attempt, "tenant": given.tenant}
    with (
        logs.about(
            job_id=given.job_id, attempt=given.attempt, tenant=given.tenant, request_id=given.request_id
        ),
        tracing.span("attempt", given.traceparent, about),
    ):
        yield replace(given, traceparent=tracing.current())


def engine_is_about(given: Assignment) -> None:
    """Every line of this process from now on."""
    logs.process_is_about(
        job_id=given.job_id, attempt=given.attempt, tenant=given.tenant, request_id=given.request_id
    )


class Observer(Protocol):
    """What the method tells (seuf_core.observer.Observer)."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Where it stands."""
        ...

    def event(self, type: str, data: Mapping[str, Any]) -> None:  # noqa: A002  (the protocol's name)
        """What happened."""
        ...

    def cancelled(self) -> bool:
        """Should it stop?"""
        ...


class Phases:
    """Passes everything on, and makes a span of each phase below the supervisor's."""

    def __init__(self, to: Observer, given: Assignment) -> None:
        self._to = to
        self._spans = tracing.Spans(given.traceparent)
        self._phase: str | None = None

    def phase(self, name: str, done: int, total: int) -> None:
        """See Observer."""
        if name != self._phase:
            self._phase = name
            self._spans.begin(name)
        self._to.phase(name, done, total)

    def event(self, type: str, data: Mapping[str, Any]) -> None:  # noqa: A002
        """See Observer."""
        self._to.event(type, data)

    def cancelled(self) -> bool:
        """See Observer."""
        return self._to.cancelled()

    def close(self) -> None:
        """The last phase is over."""
        self._spans.end()
        tracing.finish(SEND_SECONDS)
