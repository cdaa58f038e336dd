"""Files: forget, retain and evaluation sets, checked line by line while they stream in."""

from __future__ import annotations

import shutil
import tempfile
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService, audit
from api.docs import problems, upload_body
from api.upload import Intake, receive, refusal
from seuf_core.data.reader import FileSummary
from seuf_core.data.records import Limits
from store.files import Files, artefact_key
from store.ids import new_id
from store.tables import File

router = APIRouter(prefix="/files", tags=["files"])


class FileQuery(schemas.ListQuery):
    """The query of the file list."""

    purpose: schemas.Purpose | None = None


@router.post(
    "",
    status_code=201,
    openapi_extra=upload_body(),
    responses=problems(400, 413, 415, 422, invalid_examples=True),
)
async def upload_file(
    request: Request, response: Response, service: TheService, caller: TheCaller
) -> schemas.File:
    """Upload a set: JSON Lines in UTF-8, one example (or probe) a line.

    Every line is checked while it streams in. A file with a broken line is refused as a whole, with the first
    errors and their line numbers, and nothing of it is kept.
    """
    limits = Limits(max_bytes=service.settings.max_upload_bytes)
    uploads = service.settings.data_dir / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    # An unnamed file: gone by itself when this block ends, however it ends, a killed process included.
    with tempfile.TemporaryFile(dir=uploads) as spool:
        intake = Intake(limits, spool)
        summary = await receive(request, intake, limits.max_bytes)
        if not summary.ok:
            raise refusal(summary, "/file")
        row = await run_in_threadpool(_keep, service, caller, summary, intake.filename, spool)
    response.headers["Location"] = f"/files/{row.id}"
    return views.file(row)


def _keep(service: Service, caller: Caller, summary: FileSummary, name: str, content: BinaryIO) -> File:
    file_id = place(service, content)
    try:
        with service.database.write() as session:
            return record(session, caller, file_id, summary, name)
    except BaseException:
        service.artefacts.delete(artefact_key(file_id))
        raise


def place(service: Service, content: BinaryIO) -> str:
    """Put the bytes of a checked set in place, under the id returned. Before its row: no row lacks bytes."""
    file_id = new_id("file")
    content.seek(0)
    with service.artefacts.open_write(artefact_key(file_id)) as out:
        shutil.copyfileobj(content, out, 1 << 20)
    return file_id


def record(session: Session, caller: Caller, file_id: str, summary: FileSummary, name: str) -> File:
    """The row of a set whose bytes are in place, in the caller's transaction."""
    row = Files(session, caller.tenant).create(
        file_id,
        summary.purpose,
        name,
        summary.sha256,
        summary.bytes,
        summary.examples,
        summary.tokens_estimate,
    )
    audit(session, caller, "file.create", file_id)
    return row


@router.get("", responses=problems(422))
def list_files(
    service: TheService, caller: TheCaller, query: Annotated[FileQuery, Query()]
) -> schemas.Page[schemas.File]:
    """The uploaded files, newest first."""
    with service.database.read() as session:
        page = Files(session, caller.tenant).list(query.cursor, query.limit, query.purpose)
    return views.page(page, views.file)


@router.get("/{file_id}", responses=problems(404))
def get_file(file_id: str, service: TheService, caller: TheCaller) -> schemas.File:
    """One file."""
    with service.database.read() as session:
        return views.file(Files(session, caller.tenant).get(file_id))


@router.delete("/{file_id}", status_code=204, responses=problems(404, 409))
def delete_file(file_id: str, service: TheService, caller: TheCaller) -> None:
    """Delete a file and its bytes. Ended jobs keep its digest; one that still needs it blocks this (409)."""
    with service.database.write() as session:
        Files(session, caller.tenant).delete(file_id)
        audit(session, caller, "file.delete", file_id)
    service.artefacts.delete(artefact_key(file_id))
