"""Uploaded sets, and uploads that are still under way."""

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from store.tables.base import Listed, Tenanted


class File(Listed):
    """A forget, retain or evaluation set; its bytes are the artefact files/<id>.jsonl.

    `sha256` and `bytes` are of that artefact, `uploaded_*` of what was sent (another format is turned into JSON Lines).
    A deleted file stays as a row without name and bytes: that it was deleted, and when, is a fact to show. An artefact
    whose row has `deleted_at`, or that has no row, is left over from a crash and may be deleted.
    """

    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant", "created_at", "id"),)
    purpose: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16), default="jsonl")
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    uploaded_sha256: Mapped[str] = mapped_column(String(64))
    uploaded_bytes: Mapped[int] = mapped_column(BigInteger)
    examples: Mapped[int]
    tokens_estimate: Mapped[int] = mapped_column(BigInteger)
    deleted_at: Mapped[datetime | None]


class Upload(Listed):
    """A file that comes in parts, until it is complete (then `file_id` names it) or has expired.

    `bytes`, `sha256`: what the whole is to be, where the client said so.
    """

    __tablename__ = "uploads"
    __table_args__ = (Index(None, "tenant", "created_at", "id"), Index(None, "expires_at"))
    purpose: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    expires_at: Mapped[datetime]
    file_id: Mapped[str | None] = mapped_column(String(32))


class UploadPart(Tenanted):
    """A part that is there, numbered from 1; its bytes are the artefact uploads/<id>/<name>.

    The name is another one each time a part is sent: bytes under a name never change, and whoever lost a race deletes
    its own only.
    """

    __tablename__ = "upload_parts"
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
