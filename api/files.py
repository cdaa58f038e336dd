"""Files: forget, retain and evaluation sets, checked line by line while they stream in."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService, audit, needs
from api.docs import problems, upload_body
from api.idempotency import Once, TheUploadOnce
from api.multipart import Intake, receive
from api.sets import Incoming, placed, record, refusal
from seuf_core.data.reader import FileSummary
from store.files import Files, artefact_key

router = APIRouter(prefix="/files", tags=["files"])


class FileQuery(schemas.ListQuery):
    """The query of the file list."""

    purpose: schemas.Purpose | None = None


@router.post(
    "",
    dependencies=[needs("files:write")],
    status_code=201,
    openapi_extra=upload_body(),
    response_model=schemas.File,
    responses=problems(400, 408, 409, 413, 415, 422, invalid_examples=True),
)
async def upload_file(
    request: Request, service: TheService, caller: TheCaller, once: TheUploadOnce
) -> Response:
    """Upload a set: JSON Lines, CSV, Parquet or plain text.

    Every line is checked while it streams in. A file with a broken line is refused as a whole, with the first
    errors and their line numbers, and nothing of it is kept. What is not JSON Lines is stored as JSON Lines.
    A file over the limit of one request goes in parts: POST /uploads.
    """
    with Intake(service.settings) as intake:
        incoming, summary = await receive(request, intake, service.settings)
        if not summary.ok:
            raise refusal(summary, "/file")
        return await run_in_threadpool(_keep, service, caller, summary, intake.filename, incoming, once)


def _keep(
    service: Service, caller: Caller, summary: FileSummary, name: str, incoming: Incoming, once: Once
) -> Response:
    # What came, whatever the boundary between its parts was.
    once.begin(f"{summary.purpose} {summary.format} {summary.sent_sha256} {name}".encode())
    with placed(service) as placing:
        file_id = placing.put(incoming.lines)
        with service.database.write() as session:
            row = record(service, session, caller, file_id, summary, name)
            return once.answer(session, 201, views.file(row), {"Location": f"/files/{row.id}"})


@router.get("", dependencies=[needs("files:read")], responses=problems(422))
def list_files(
    service: TheService, caller: TheCaller, query: Annotated[FileQuery, Query()]
) -> schemas.Page[schemas.File]:
    """The uploaded files, newest first."""
    with service.database.read() as session:
        page = Files(session, caller.tenant).list(query.cursor, query.limit, query.purpose)
    return views.page(page, views.file)


@router.get("/{file_id}", dependencies=[needs("files:read")], responses=problems(404, 410))
def get_file(file_id: str, service: TheService, caller: TheCaller) -> schemas.File:
    """One file. Of a deleted one there is only that it was deleted, and when (410)."""
    with service.database.read() as session:
        return views.file(Files(session, caller.tenant).get(file_id))


@router.delete(
    "/{file_id}", dependencies=[needs("files:write")], status_code=204, responses=problems(404, 409, 410)
)
def delete_file(file_id: str, service: TheService, caller: TheCaller) -> None:
    """Delete a file: its bytes and its name. Ended jobs keep its digest; one that still needs it blocks this (409).

    That it was deleted stays on record, here and in the audit log.
    """
    with service.database.write() as session:
        Files(session, caller.tenant).delete(file_id)
        audit(session, caller, "file.delete", file_id)
    service.artefacts.delete(artefact_key(file_id))
