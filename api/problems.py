"""RFC 9457 problem details: the one shape of every error this service answers with.

A `Problem` is raised anywhere and carries a status, a stable `code`, what is wrong, what to do about it and,
per offending field, a JSON pointer into the body (RFC 6901) or the name of the parameter. `install` turns
everything else that can go wrong (unknown routes, wrong methods, validation, crashes) into the same shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from api.validation import field_errors
from seuf_core.errors import SeufError
from store.errors import NotFoundError, StoreError
from telemetry import logs

MEDIA_TYPE: Final = "application/problem+json"
REQUEST_ID_HEADER: Final = "X-Request-Id"
RETRY_SECONDS: Final = 5  # what Retry-After says when a part of the service is away: a restart takes about as long
MOST_LOOKED_AT: Final = 500  # errors of one body
MOST_SHOWN: Final = 50
log = logging.getLogger("seuf.api")


@dataclass(frozen=True)
class FieldError:
    """One offending place of a request.

    Attributes:
        code: stable snake_case name.
        detail: what is wrong there.
        pointer: JSON pointer into the body, "" for the whole body; None when the place is not in the body.
        parameter: name of a query, path or header parameter; None when the place is in the body.
        fix: what to do, when there is one thing to do.
        line: line number (from 1) inside an uploaded file; of a Parquet file the row.
        field: field (column) of that line.
    """

    code: str
    detail: str
    pointer: str | None = None
    parameter: str | None = None
    fix: str | None = None
    line: int | None = None
    field: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that say something, in reading order."""
        names = ("pointer", "parameter", "line", "field", "code", "detail", "fix")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Problem(HTTPException):
    """An error with a status that a client is meant to read.

    Subclasses Starlette's HTTPException so that one raised while a body is being read reaches our handler
    instead of FastAPI's "error parsing the body".
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        fix: str | None = None,
        *,
        errors: Iterable[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers) if headers else None)
        self.code = code
        self.fix = fix
        self.errors = tuple(errors)

    def as_json(self, request_id: str | None) -> dict[str, Any]:
        """The problem document (RFC 9457, section 3), with our own members beside them."""
        document: dict[str, Any] = {
            "type": f"urn:seuf:problem:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status_code,
            "detail": self.detail,
            "code": self.code,
        }
        if self.fix:
            document["fix"] = self.fix
        if request_id:
            document["request_id"] = request_id
        if self.errors:
            document["errors"] = [error.as_json() for error in self.errors]
        return document


def at(pointer: str, status: int, code: str, detail: str, fix: str | None = None) -> Problem:
    """A problem with one offending field of the body."""
    error = FieldError(code=code, detail=detail, pointer=pointer, fix=fix)
    return Problem(status, code, detail, fix, errors=[error])


def from_seuf_error(error: SeufError, pointer: str, status: int = 422) -> Problem:
    """A library error as a problem; `pointer` says which field of the body caused it."""
    return at(pointer, status, error.code, error.message, error.fix)


def respond(problem: Problem, request_id: str | None) -> JSONResponse:
    """The problem as a response, with the request id in header and body."""
    headers = dict(problem.headers or {})
    if request_id:
        headers[REQUEST_ID_HEADER] = request_id
    return JSONResponse(
        problem.as_json(request_id), status_code=problem.status_code, headers=headers, media_type=MEDIA_TYPE
    )


def request_id_of(request: Request) -> str | None:
    """The id the request middleware gave this request."""
    return getattr(request.state, "request_id", None)


async def _http_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    problem = error if isinstance(error, Problem) else _from_starlette(request, error)
    return respond(problem, request_id_of(request))


def _from_starlette(request: Request, error: HTTPException) -> Problem:
    """Errors raised by the framework itself: routing, methods, unreadable bodies."""
    where = f"{request.method} {request.url.path}"
    known = {
        404: Problem(
            404, "route_not_found", f"{where} does not exist.", "The routes are listed in /openapi.json."
        ),
        405: Problem(
            405,
            "method_not_allowed",
            f"{where} is not allowed.",
            "The Allow header names the methods of this path.",
            headers={"Allow": ", ".join(_methods_of(request))} if error.status_code == 405 else None,
        ),
        400: Problem(
            400, "unreadable_body", "The request body cannot be read.", "Send JSON with its Content-Type."
        ),
    }
    if error.status_code in known:
        return known[error.status_code]
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return Problem(error.status_code, code, str(error.detail or phrase), headers=error.headers)


def _methods_of(request: Request) -> list[str]:
    """The methods of this path over all routes; the framework names those of the first route only."""
    routes = request.app.routes
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _validation_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    raw = error.errors()
    errors = [FieldError(**fields) for fields in field_errors(raw[:MOST_LOOKED_AT], error.body)]
    first = errors[0]
    # Fields that do not go together are one mistake, and its message names them all.
    others = [error for error in errors[1:] if error.code != "method_misfit"]
    number = len(others) + max(0, len(raw) - MOST_LOOKED_AT)
    more = f" (and {number} more)" if number else ""
    errors = errors[:MOST_SHOWN]
    place = first.parameter if first.parameter is not None else (first.pointer or "the body")
    if first.code == "json_invalid":
        problem = Problem(400, "json_invalid", first.detail, first.fix, errors=errors)
    else:
        problem = Problem(422, "invalid_request", f"{place}: {first.detail}{more}", first.fix, errors=errors)
    return respond(problem, request_id_of(request))


_STATUS_OF: Final[dict[str, int]] = {
    "not_found": 404,
    "name_taken": 409,
    "file_in_use": 409,
    "file_deleted": 410,
    "file_too_large": 413,
    "upload_complete": 409,
    "upload_incomplete": 409,
    "upload_changed": 409,
    "too_many_uploads": 409,
    "transition_refused": 409,
    "too_many_webhooks": 409,
    "webhook_disabled": 409,
    "invalid_cursor": 422,
    "unknown_scope": 422,
    "missing_scope": 403,
    "expiry_refused": 422,
    "too_many_keys": 409,
    "key_ended": 409,
    "quota_exceeded": 429,
    "idempotency_key_reused": 422,
    "request_in_flight": 409,
    "storage_away": 503,
}
# Seconds after which it may be otherwise.
_RETRY_AFTER: Final[dict[str, int]] = {
    "storage_away": RETRY_SECONDS,
    "request_in_flight": 1,
    "quota_exceeded": 60,
}


async def _store_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreError)
    status = _STATUS_OF.get(error.code)
    if status is None:
        return await _crash(request, error)
    code = f"{error.kind}_not_found" if isinstance(error, NotFoundError) else error.code
    errors = []
    if error.code == "invalid_cursor":
        errors = [FieldError(error.code, error.message, parameter="cursor", fix=error.fix)]
    headers = {"Retry-After": str(_RETRY_AFTER[error.code])} if error.code in _RETRY_AFTER else None
    problem = Problem(status, code, error.message, error.fix, errors=errors, headers=headers)
    return respond(problem, request_id_of(request))


async def _unstorable(request: Request, _error: Exception) -> JSONResponse:
    """A value in the address that the database refuses as text, such as %00."""
    problem = Problem(
        422, "invalid_text", "The address has a character that no id or name has.", "Remove it."
    )
    return respond(problem, request_id_of(request))


async def _crash(request: Request, error: Exception) -> JSONResponse:
    request_id = request_id_of(request)
    with logs.about(request_id=request_id):
        if isinstance(error, ClientDisconnect):
            log.info("the client left before its request was whole")
        else:
            # The route, not the address: that may hold anything.
            route = getattr(request.scope.get("route"), "path_format", "no route")
            log.error("%s %s crashed", request.method, route, exc_info=error)
    problem = Problem(
        500,
        "internal_error",
        "The service failed while it answered this request.",
        "Try again; if it stays, report the request id: the service's log has the cause under it.",
    )
    return respond(problem, request_id)


def install(app: FastAPI) -> None:
    """Register the handlers that make every error a problem document."""
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(StoreError, _store_problem)
    app.add_exception_handler(DataError, _unstorable)
    app.add_exception_handler(Exception, _crash)
