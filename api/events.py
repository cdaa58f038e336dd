"""The events of a job: JSON pages, or Server-Sent Events with replay for whoever asks for them."""

from __future__ import annotations

from typing import Annotated, Final, cast

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService, needs
from api.docs import problems
from api.feed import Feed
from api.problems import FieldError, Problem
from store.events import Events, Head

router = APIRouter(prefix="/jobs", tags=["jobs"])

EVENT_STREAM: Final = "text/event-stream"
_SEEN_ALL: Final = "The job has ended and every event was sent already."


class EventPage(BaseModel):
    """One page of events, oldest first; go on with ?after=<next>."""

    data: list[schemas.Event]
    has_more: bool
    next: int | None


@router.get(
    "/{job_id}/events",
    dependencies=[needs("jobs:read")],
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
    head = await run_in_threadpool(_head, service, caller, job_id)
    if head.ended and after >= head.seq:
        return Response(status_code=204)
    feed = cast("Feed", request.app.state.feed)
    stream = feed.messages(caller.tenant, job_id, head, after)
    # no-transform, X-Accel-Buffering: a proxy that collects the stream would make it useless.
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers=headers)


def _page(service: Service, caller: Caller, job_id: str, query: schemas.EventQuery) -> EventPage:
    with service.database.read() as session:
        events = Events(session, caller.tenant)
        events.head(job_id)  # or 404
        rows = list(events.list(job_id, query.after, query.limit + 1))
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


def _head(service: Service, caller: Caller, job_id: str) -> Head:
    with service.database.read() as session:
        return Events(session, caller.tenant).head(job_id)
