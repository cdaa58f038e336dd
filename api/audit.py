"""The audit log: who did what, the signed heads of its chain, and the whole of it to check elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime, BaseModel, Field

from api import schemas
from api.context import Caller, Service, TheCaller, TheService, needs
from api.docs import problems
from api.problems import Problem
from store import chain, signing
from store.audit import Audit, plain, plain_head

router = APIRouter(prefix="/audit", tags=["audit"])

JSON_LINES: Final = "application/jsonl"
_ROWS: Final = 1000  # that an export holds in memory
_HASH: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_KEY: Final = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
_AT: Final = "2026-11-24T06:00:00.000000Z"


class AuditRow(schemas.Answer):
    """One act. `hash` is the sha256 of the other fields as canonical JSON (RFC 8785)."""

    tenant: str
    seq: int = Field(description="From 1, without gaps.", examples=[41])
    who: str = Field(description="Id of the key, or system.", examples=["key_a2b3c4d5e6f7g2h3i4j5"])
    what: str = Field(examples=["job.create"])
    object: str = Field(description="Id of what it was done to.", examples=[schemas.JOB_ID])
    request_id: str | None = Field(description="X-Request-Id of the request that did it.")
    at: str = Field(description="UTC with microseconds, exactly as it is hashed.", examples=[_AT])
    previous_hash: str = Field(description="`hash` of the row before it; of the first row 64 zeros.")
    hash: str = Field(examples=[_HASH])


class AuditHead(schemas.Answer):
    """Signed: row `seq` was the last one at that time. Keep some elsewhere: they show what is cut off later."""

    tenant: str
    seq: int = Field(examples=[42])
    hash: str = Field(description="Of that row.", examples=[_HASH])
    at: str = Field(examples=[_AT])
    key_id: str = Field(description="The public key, 32 bytes in hexadecimal.", examples=[_KEY])
    signature: str = Field(description="ed25519, in base64.")


class AuditKey(BaseModel):
    """The public key that this service's heads are signed with."""

    key_id: str = Field(description="The key itself, 32 bytes in hexadecimal.", examples=[_KEY])
    algorithm: Literal["ed25519"] = "ed25519"
    pem: str = Field(description="The same as PEM (SubjectPublicKeyInfo).")


class AuditQuery(schemas.ListQuery):
    """The query of the audit log; every given filter must match exactly."""

    who: schemas.Text | None = Field(None, max_length=64, description="Id of a key, or system.")
    what: schemas.Text | None = Field(None, max_length=64, description="For example job.create.")
    object: schemas.Text | None = Field(None, max_length=64, description="Id of what something was done to.")
    since: AwareDatetime | None = Field(
        None, description="Not before this time, with its zone (2026-11-24T06:00:00Z)."
    )


@router.get("", dependencies=[needs("audit:read")], responses=problems(422))
def list_audit(
    service: TheService, caller: TheCaller, query: Annotated[AuditQuery, Query()]
) -> schemas.Page[AuditRow]:
    """What was done, newest first. It never holds any text of a set."""
    with service.database.read() as session:
        page = Audit(session, caller.tenant).page(
            query.cursor, query.limit, query.who, query.what, query.object, query.since
        )
    rows = [AuditRow.model_validate(plain(row)) for row in page.data]
    return schemas.Page(data=rows, has_more=page.has_more, next=page.next)


@router.get("/heads", dependencies=[needs("audit:read")], responses=problems(422))
def list_heads(
    service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[AuditHead]:
    """The signed heads, newest first."""
    with service.database.read() as session:
        page = Audit(session, caller.tenant).heads(query.cursor, query.limit)
    heads = [AuditHead.model_validate(plain_head(head)) for head in page.data]
    return schemas.Page(data=heads, has_more=page.has_more, next=page.next)


@router.get("/key", dependencies=[needs("audit:read")], responses=problems(404))
def get_key(service: TheService) -> AuditKey:
    """The public key. Fetch it once, when the service is set up, and keep it: a key fetched later is only as good as
    the service that day.
    """
    key = signing.public_key(service.settings)
    if key is None:
        raise Problem(
            404,
            "audit_key_not_there",
            "This service has no key to sign its audit log with.",
            "Give every process of it SEUF_AUDIT_KEY_FILE.",
        )
    return AuditKey(key_id=chain.key_id_of(key), pem=signing.as_pem(key))


@router.get(
    "/export",
    dependencies=[needs("audit:read")],
    response_class=StreamingResponse,
    responses={
        200: {
            "description": 'JSON Lines: {"row": ...} for each row, oldest first, then {"head": ...}, the newest head.',
            "content": {JSON_LINES: {"schema": {"type": "string"}}},
        },
        **problems(),
    },
)
def export_audit(service: TheService, caller: TheCaller) -> StreamingResponse:
    """The whole log for `seuf audit verify`, which needs nothing but this file and the public key."""
    return StreamingResponse(
        _export(service, caller),
        media_type=JSON_LINES,
        headers={"Content-Disposition": 'attachment; filename="audit.jsonl"', "Cache-Control": "no-store"},
    )


def _export(service: Service, caller: Caller) -> Iterator[bytes]:
    """Page by page, up to where the log stood when it began: its newest head is then in reach."""
    with service.database.read() as session:
        last, newest = Audit(session, caller.tenant).end()
    seq = 0
    while seq < last:
        with service.database.read() as session:
            rows = Audit(session, caller.tenant).list(seq, _ROWS, until=last)
        if not rows:
            break  # somebody cut the log off: whoever checks the export will see it
        yield b"".join(chain.lines_of(map(plain, rows), None))
        seq = rows[-1].seq
    yield b"".join(chain.lines_of((), plain_head(newest) if newest else None))
