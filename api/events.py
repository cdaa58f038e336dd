"""The events of a job: JSON pages, or Server-Sent Events with replay for whoever asks for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService
from api.docs import problems
from api.problems import FieldError, Problem
from store.events import Events
from store.jobs import Jobs
from store.tables import Event
from store.transitions import FINAL

router = APIRouter(prefix="/jobs", tags=["jobs"])

EVENT_STREAM: Final = "text/event-stream"
LOOK_SECONDS: Final = 0.5  # between two looks at the database, per open stream
SILENCE_SECONDS: Final = 15.0  # a comment goes out after this long without an event, so that proxies stay
BATCH: Final = 500
_SEEN_ALL: Final = "The job has ended and every event was sent already."


class EventPage(BaseModel):
    """One page of events, oldest first; go on with ?after=<next>."""

    data: list[schemas.Event]
    has_more: bool
    next: int | None


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses={
        200: {
            "content": {
                EVENT_STREAM: {"example": 'id: 1\nevent: status\ndata: {"seq": 1, "type": "status"}\n\n'}
            }
        },
        204: {"description": _SEEN_ALL},
        **problems(404, 422),
    },
)
async def list_events(
    job_id: str,
    request: Request,
    service: TheService,
    caller: TheCaller,
    query: Annotated[schemas.EventQuery, Query()],
) -> Response:
    """What happened to a job, numbered from 1 without gaps.

    With `Accept: text/event-stream` it is a live stream that ends after the job's last event; reconnect with
    `Last-Event-ID` and it goes on behind that one. Once the job has ended and nothing is left, 204: stop.
    """
    if EVENT_STREAM not in request.headers.get("accept", ""):
        page = await run_in_threadpool(_page, service, caller, job_id, query)
        return Response(page.model_dump_json(), media_type="application/json")
    after = _last_event_id(request, query.after)
    rows, ended = await run_in_threadpool(_look, service, caller, job_id, after)
    if ended and not rows:
        return Response(status_code=204)
    stream = _stream(service, caller, job_id, after)
    # no-transform, X-Accel-Buffering: a proxy that collects the stream would make it useless.
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers=headers)


def _page(service: Service, caller: Caller, job_id: str, query: schemas.EventQuery) -> EventPage:
    with service.database.read() as session:
        Jobs(session, caller.tenant).get(job_id)
        rows = list(Events(session, caller.tenant).list(job_id, query.after, query.limit + 1))
    data = [views.event(row) for row in rows[: query.limit]]
    more = len(rows) > query.limit
    return EventPage(data=data, has_more=more, next=data[-1].seq if more else None)


def _last_event_id(request: Request, after: int) -> int:
    given = request.headers.get("last-event-id")
    if given is None or given == "":
        return after
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        detail = f"Last-Event-ID is {given[:40]!r}, which is no event number."
        error = FieldError("invalid_event_id", detail, parameter="Last-Event-ID")
        raise Problem(
            422, "invalid_event_id", detail, "Send the id of the last event you saw.", errors=[error]
        )
    return int(given)


def _look(service: Service, caller: Caller, job_id: str, after: int) -> tuple[list[Event], bool]:
    """The next events, and whether the job has ended and these are its last.

    The state is read before the events: a job that ends in between is then seen at the next look, instead of
    ending the stream without its last event.
    """
    with service.database.read() as session:
        ended = Jobs(session, caller.tenant).get(job_id).status in FINAL
    with service.database.read() as session:
        rows = list(Events(session, caller.tenant).list(job_id, after, BATCH))
    return rows, ended and len(rows) < BATCH


async def _stream(service: Service, caller: Caller, job_id: str, after: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    spoke = loop.time()
    while True:
        rows, ended = await run_in_threadpool(_look, service, caller, job_id, after)
        for row in rows:
            yield _message(row)
            after = row.seq
        if ended:
            return
        now = loop.time()
        if rows:
            spoke = now
        elif now - spoke >= SILENCE_SECONDS:
            yield b": still here\n\n"
            spoke = now
        await asyncio.sleep(LOOK_SECONDS)


def _message(row: Event) -> bytes:
    event: dict[str, Any] = views.event(row).model_dump(mode="json")
    # ASCII only: no character in it can be taken for the end of a line, whatever a client splits at.
    return f"id: {row.seq}\nevent: {row.type}\ndata: {json.dumps(event)}\n\n".encode()
