"""Uploads in parts: for files over the cap of one request, and for networks that break."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import shutil
import tempfile
from typing import Annotated, BinaryIO, Final, cast

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService, audit, needs
from api.docs import part_body, problems
from api.idempotency import TheOnce
from api.multipart import cut_off, refuse_encoded
from api.problems import FieldError, Problem, at, from_seuf_error
from api.sets import Incoming, placed, record, refusal, shown_name, spool_folder
from seuf_core.data.formats import Format, format_of
from seuf_core.data.reader import READ_BYTES, check_format
from seuf_core.errors import DataError
from store.errors import UploadChangedError
from store.files import Files
from store.ids import random_base32
from store.tables import File, Upload, UploadPart
from store.tenants import Quota
from store.uploads import MAX_PARTS, NewUpload, Uploads, folder_key, forget, part_key

router = APIRouter(prefix="/uploads", tags=["files"])

_DIGEST: Final = re.compile(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/=]*):")
Number = Annotated[int, Path(ge=1, le=MAX_PARTS, description="From 1, without gaps once it is complete.")]


@router.post(
    "",
    dependencies=[needs("files:write")],
    status_code=201,
    response_model=schemas.Upload,
    responses=problems(400, 409, 413, 422),
)
def create_upload(
    body: schemas.UploadCreate, service: TheService, caller: TheCaller, once: TheOnce
) -> Response:
    """Begin a file that comes in parts.

    Send its parts with PUT, of at most `part_bytes` each, in any order and as often as needed; then complete it.
    """
    settings = service.settings
    if body.bytes is not None and body.bytes > settings.max_file_bytes:
        detail = f"The file is over the limit of {settings.max_file_bytes} bytes."
        fix = "Split it into several files, or raise SEUF_MAX_FILE_BYTES."
        raise at("/bytes", 413, "file_too_large", detail, fix)
    name = shown_name(body.filename)
    kind = body.format or format_of(name)
    try:
        check_format(body.purpose, kind)
    except DataError as error:
        raise from_seuf_error(error, "/format") from error
    announced = NewUpload(body.purpose, name, kind, body.bytes, body.sha256)
    with service.database.write() as session:
        row = Uploads(session, caller.tenant).create(announced, settings.upload_seconds)
        audit(session, caller, "upload.create", row.id)
        shown = views.upload(row, [], settings.upload_part_bytes)
        return once.answer(session, 201, shown, {"Location": f"/uploads/{row.id}"})


@router.get("", dependencies=[needs("files:read")], responses=problems(422))
def list_uploads(
    service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[schemas.Upload]:
    """The uploads that are open, newest first."""
    with service.database.read() as session:
        uploads = Uploads(session, caller.tenant)
        page = uploads.list(query.cursor, query.limit)
        parts = {row.id: uploads.parts(row.id) for row in page.data}
    return views.page(page, lambda row: views.upload(row, parts[row.id], service.settings.upload_part_bytes))


@router.get("/{upload_id}", dependencies=[needs("files:read")], responses=problems(404))
def get_upload(upload_id: str, service: TheService, caller: TheCaller) -> schemas.Upload:
    """One upload: which parts are there, and the file that it became when it is complete."""
    with service.database.read() as session:
        uploads = Uploads(session, caller.tenant)
        row, parts = uploads.get(upload_id), uploads.parts(upload_id)
    return views.upload(row, parts, service.settings.upload_part_bytes)


@router.put(
    "/{upload_id}/parts/{number}",
    dependencies=[needs("files:write")],
    openapi_extra=part_body(),
    responses={
        201: {"description": "The part is new.", "model": schemas.Part},
        **problems(400, 404, 408, 409, 413, 415, 422),
    },
)
async def put_part(
    upload_id: str,
    number: Number,
    request: Request,
    response: Response,
    service: TheService,
    caller: TheCaller,
) -> schemas.Part:
    """Send a part: its bytes are the body as they are. The same bytes again change nothing; others take its place.

    `Content-Digest` or `Repr-Digest` (RFC 9530, sha-256) is checked if it is sent.
    """
    await run_in_threadpool(_check_open, service, caller, upload_id)
    refuse_encoded(request)
    with tempfile.TemporaryFile(dir=spool_folder(service.settings)) as spool:
        size, digest = await _spooled(request, spool, service.settings.upload_part_bytes)
        _check_digest(request, digest)
        part = UploadPart(
            upload_id=upload_id, number=number, name=random_base32(20), bytes=size, sha256=digest.hex()
        )
        shown = views.part(part)
        if await run_in_threadpool(_keep, service, caller, part, spool):
            response.status_code = 201
    return shown


def _check_open(service: Service, caller: Caller, upload_id: str) -> None:
    with service.database.read() as session:
        Uploads(session, caller.tenant).get(upload_id)


async def _spooled(request: Request, spool: BinaryIO, limit: int) -> tuple[int, bytes]:
    """The size and sha256 of the body, which is on disk then."""
    too_large = at(
        "",
        413,
        "part_too_large",
        f"A part may have {limit} bytes.",
        "Send smaller parts; `part_bytes` says how large.",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    size, digest = 0, hashlib.sha256()
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise too_large
            digest.update(piece)
            await run_in_threadpool(spool.write, piece)
    except ClientDisconnect as error:
        raise cut_off() from error
    if size == 0:
        raise at("", 422, "empty_part", "The part has no bytes.", "Send its bytes as the body.")
    return size, digest.digest()


def _check_digest(request: Request, digest: bytes) -> None:
    for name in ("Content-Digest", "Repr-Digest"):
        given = request.headers.get(name)
        if given is None:
            continue
        error = None
        found = _DIGEST.search(given)
        if found is None:
            error = (
                "unknown_digest",
                f"{name} has no sha-256.",
                "Write it as sha-256=:<base64 of 32 bytes>:.",
            )
        elif _decoded(found.group(1)) != digest:
            error = ("digest_mismatch", f"The bytes are not those that {name} says.", "Send the part again.")
        if error is not None:
            code, detail, fix = error
            raise Problem(422, code, detail, fix, errors=[FieldError(code, detail, parameter=name, fix=fix)])


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


def _keep(service: Service, caller: Caller, part: UploadPart, spool: BinaryIO) -> bool:
    """Put the bytes in place, then the row; true when there was no part of this number."""
    settings, upload_id = service.settings, part.upload_id
    key = part_key(upload_id, part.name)
    spool.seek(0)
    with service.artefacts.open_write(key) as out:
        shutil.copyfileobj(spool, out, READ_BYTES)
    try:
        with service.database.write() as session:
            Quota(session, caller.tenant).check(settings.limits(), stored_bytes=part.bytes)
            uploads = Uploads(session, caller.tenant)
            unused = uploads.put(upload_id, part, settings.upload_seconds, settings.max_file_bytes)
            audit(session, caller, "upload.part", upload_id)
    except BaseException:
        service.artefacts.delete(key)
        raise
    if unused is not None:
        service.artefacts.delete(part_key(upload_id, unused))
    return unused is None


@router.post(
    "/{upload_id}/complete",
    dependencies=[needs("files:write")],
    status_code=201,
    responses=problems(404, 409, 410, 413, 422, invalid_examples=True),
)
def complete_upload(
    upload_id: str, response: Response, service: TheService, caller: TheCaller
) -> schemas.File:
    """Make a file of the parts: numbered without gaps, and what was announced. Every line is checked now.

    When it is refused the parts stay: replace those that are wrong, or delete the upload. Asked again after it
    worked, it answers the same file.
    """
    with service.database.read() as session:
        upload, parts = Uploads(session, caller.tenant).whole(upload_id)
        row = Files(session, caller.tenant).get(upload.file_id) if upload.file_id is not None else None
    if row is None:
        row = _made(service, caller, upload, parts)
        service.artefacts.delete(folder_key(upload_id))
    response.headers["Location"] = f"/files/{row.id}"
    return views.file(row)


def _made(service: Service, caller: Caller, upload: Upload, parts: list[UploadPart]) -> File:
    settings = service.settings
    purpose, kind = cast("schemas.Purpose", upload.purpose), cast("Format", upload.format)
    with Incoming(settings, purpose, kind, settings.max_file_bytes) as incoming:
        _read_parts(service, upload, parts, incoming)
        summary = incoming.finish()
        if upload.sha256 is not None and summary.sent_sha256 != upload.sha256:
            detail = f"The parts together have the sha256 {summary.sent_sha256}, not the one announced."
            raise at("", 422, "digest_mismatch", detail, "Send again the parts whose `sha256` is wrong.")
        if not summary.ok:
            raise refusal(summary, "/file")
        with placed(service) as placing:
            file_id = placing.put(incoming.lines)
            with service.database.write() as session:
                winner = Uploads(session, caller.tenant).finish(upload.id, parts, file_id)
                if winner == file_id:
                    audit(session, caller, "upload.complete", upload.id)
                    return record(service, session, caller, file_id, summary, upload.name)
                row = Files(session, caller.tenant).get(winner)
            placing.undo()
            return row


def _read_parts(service: Service, upload: Upload, parts: list[UploadPart], incoming: Incoming) -> None:
    try:
        for part in parts:
            with service.artefacts.open_read(part_key(upload.id, part.name)) as stream:
                while piece := stream.read(READ_BYTES):
                    incoming.write(piece)
    except FileNotFoundError as error:
        raise UploadChangedError(
            f"A part of {upload.id} was replaced while it was completed.", "Complete it again."
        ) from error


@router.delete("/{upload_id}", dependencies=[needs("files:write")], status_code=204, responses=problems(404))
def delete_upload(upload_id: str, service: TheService, caller: TheCaller) -> None:
    """Give an upload up: its parts are deleted. The file of one that is complete stays."""
    with service.database.write() as session:
        Uploads(session, caller.tenant).expire(upload_id)
        audit(session, caller, "upload.delete", upload_id)
    service.artefacts.delete(folder_key(upload_id))
    with service.database.write() as session:
        forget(session, upload_id)
