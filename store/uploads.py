"""Uploads in parts of one tenant, from their announcement to the file that they become.

The bytes of a part are an artefact of their own. Rows say which of them count, so that whatever is cut off leaves an
upload that can go on, or that expires.
"""

import builtins
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from store.audit import SYSTEM, Audit
from store.errors import (
    NotFoundError,
    TooManyUploadsError,
    UploadChangedError,
    UploadCompleteError,
    UploadIncompleteError,
    UploadTooLargeError,
)
from store.ids import new_id
from store.repository import Page, Repository
from store.tables import Upload, UploadPart, now

MAX_PARTS: Final = 10_000
MAX_OPEN: Final = 100
"""Open uploads of a tenant: each may hold a whole file's bytes."""


@dataclass(frozen=True)
class NewUpload:
    """What is announced; `bytes` and `sha256` of the whole, where the client knows them."""

    purpose: str
    name: str
    format: str
    bytes: int | None
    sha256: str | None


def folder_key(upload_id: str) -> str:
    """The artefact folder of an upload's parts."""
    return f"uploads/{upload_id}"


def part_key(upload_id: str, name: str) -> str:
    """The artefact of one part's bytes."""
    return f"{folder_key(upload_id)}/{name}"


class Uploads(Repository):
    """The uploads of one tenant. One that has expired is not found."""

    def create(self, announced: NewUpload, seconds: float) -> Upload:
        """Open for so many seconds after its latest part. TooManyUploadsError."""
        count = select(func.count()).select_from(self._open().subquery())
        if self.session.execute(count).scalar_one() >= MAX_OPEN:
            raise TooManyUploadsError(
                f"{MAX_OPEN} uploads are open.", "Complete or delete some: GET /uploads lists them."
            )
        row = Upload(
            id=new_id("upload"),
            purpose=announced.purpose,
            name=announced.name,
            format=announced.format,
            bytes=announced.bytes,
            sha256=announced.sha256,
            expires_at=now() + timedelta(seconds=seconds),
        )
        return self._add(row)

    def get(self, upload_id: str) -> Upload:
        """The upload, or NotFoundError."""
        return self._one(self._live().where(Upload.id == upload_id), "upload", upload_id)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[Upload]:
        """Those that are open, newest first."""
        return self._page(self._open(), Upload, cursor, limit)

    def parts(self, upload_id: str) -> Sequence[UploadPart]:
        """The parts that are there, in order."""
        query = self._select(UploadPart).where(UploadPart.upload_id == upload_id)
        return self.session.scalars(query.order_by(UploadPart.number)).all()

    def put(self, upload_id: str, part: UploadPart, seconds: float, max_bytes: int) -> str | None:
        """Record a part whose bytes are in place, in the place of one of its number.

        Returns the name of bytes that no longer count: those of the part before, or those just sent where the part
        was there already with the same content. UploadCompleteError; UploadTooLargeError past `max_bytes`.
        """
        upload = self._held(upload_id)
        if upload.file_id is not None:
            raise UploadCompleteError(
                f"{upload_id} is complete: it is {upload.file_id}.", "Start a new upload."
            )
        there = {row.number: row for row in self.parts(upload_id)}
        before = there.pop(part.number, None)
        size = part.bytes + sum(row.bytes for row in there.values())
        limit = min(max_bytes, upload.bytes or max_bytes)
        if size > limit:
            raise UploadTooLargeError(
                f"With part {part.number} the upload has {size} bytes, more than {limit}.",
                "Announce the size it has, if the service allows that much, or split the set into several files.",
            )
        upload.expires_at = now() + timedelta(seconds=seconds)
        if before is None:
            self._add(part)
            return None
        if before.sha256 == part.sha256:
            return part.name
        unused, before.name = before.name, part.name
        before.bytes, before.sha256 = part.bytes, part.sha256
        self.session.flush()
        return unused

    def whole(self, upload_id: str) -> tuple[Upload, builtins.list[UploadPart]]:
        """The upload and all its parts, or, when it is complete, the upload and nothing. UploadIncompleteError."""
        upload = self.get(upload_id)
        if upload.file_id is not None:
            return upload, []
        parts = list(self.parts(upload_id))
        missing = next((n for n, part in enumerate(parts, start=1) if part.number != n), None)
        size = sum(part.bytes for part in parts)
        if missing is not None or not parts:
            raise UploadIncompleteError(
                f"Part {missing or 1} is missing.", "Send it: parts are numbered from 1 without gaps."
            )
        if upload.bytes is not None and size != upload.bytes:
            raise UploadIncompleteError(
                f"The parts have {size} bytes together, but {upload.bytes} were announced.",
                "Send what is missing, or begin a new upload.",
            )
        return upload, parts

    def finish(self, upload_id: str, parts: Sequence[UploadPart], file_id: str) -> str:
        """The upload is the file `file_id`, made of exactly these parts; or of whoever completed it before.

        Returns the id of that file. UploadChangedError when a part was replaced since `parts` were read.
        """
        upload = self._held(upload_id)
        if upload.file_id is not None:
            return upload.file_id
        if [(part.number, part.name) for part in self.parts(upload_id)] != [
            (p.number, p.name) for p in parts
        ]:
            raise UploadChangedError(
                f"A part of {upload_id} was replaced while it was completed.", "Complete it again."
            )
        self.session.execute(self._delete(UploadPart).where(UploadPart.upload_id == upload_id))
        upload.file_id = file_id
        self.session.flush()
        return file_id

    def expire(self, upload_id: str) -> None:
        """From now on the upload is not found, and nothing more can be sent to it."""
        self._held(upload_id).expires_at = now()
        self.session.flush()

    def _live(self) -> Select[Upload]:
        return self._select(Upload).where(Upload.expires_at > now())

    def _open(self) -> Select[Upload]:
        return self._live().where(Upload.file_id.is_(None))

    def _held(self, upload_id: str) -> Upload:
        """The upload, its row held until the transaction ends: two who change it take turns."""
        hold = self._update(Upload).where(Upload.id == upload_id, Upload.expires_at > now())
        hold = hold.values(file_id=Upload.file_id).returning(Upload)
        options = {"populate_existing": True, "synchronize_session": False}
        row = self.session.scalars(hold, execution_options=options).one_or_none()
        if row is None:
            raise NotFoundError("upload", upload_id)
        return row


def expired(session: Session, limit: int = 100) -> Sequence[str]:
    """Uploads of all tenants that nobody can see any more: their bytes may go, and then their rows (`forget`)."""
    query = select(Upload.id).where(Upload.expires_at <= now()).order_by(Upload.expires_at).limit(limit)
    return session.scalars(query).all()


def forget(session: Session, upload_id: str) -> None:
    """The rows of an expired upload whose bytes are gone; that they are is an act of the service."""
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))
    gone = delete(Upload).where(Upload.id == upload_id, Upload.expires_at <= now()).returning(Upload.tenant)
    tenant = session.scalars(gone, execution_options={"synchronize_session": False}).one_or_none()
    if tenant is not None:
        Audit(session, tenant).record(SYSTEM, "upload.expire", upload_id)
