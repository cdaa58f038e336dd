"""Uploaded sets of one tenant. The bytes are artefacts (files/<id>.jsonl); this is what is known of them."""

from dataclasses import dataclass

from sqlalchemy import Select, or_

from store.errors import FileDeletedError, FileInUseError
from store.repository import Page, Repository
from store.tables import File, Job, now
from store.transitions import FINAL


def artefact_key(file_id: str) -> str:
    """Where a file's bytes are among the artefacts."""
    return f"files/{file_id}.jsonl"


@dataclass(frozen=True)
class Sent:
    """What came in, where that is not the JSON Lines that are stored."""

    format: str
    sha256: str
    bytes: int


class Files(Repository):
    """The files of one tenant."""

    def create(
        self,
        file_id: str,
        purpose: str,
        name: str,
        sha256: str,
        size: int,
        examples: int,
        tokens_estimate: int,
        sent: Sent | None = None,
    ) -> File:
        """Record a file whose bytes, `size` of them with digest `sha256`, are already in place."""
        sent = sent or Sent("jsonl", sha256, size)
        return self._add(
            File(
                id=file_id,
                purpose=purpose,
                name=name,
                format=sent.format,
                sha256=sha256,
                bytes=size,
                uploaded_sha256=sent.sha256,
                uploaded_bytes=sent.bytes,
                examples=examples,
                tokens_estimate=tokens_estimate,
            )
        )

    def get(self, file_id: str) -> File:
        """The file. NotFoundError, or FileDeletedError for one that was deleted."""
        return self._there(self._select(File).where(File.id == file_id), file_id)

    def held(self, file_id: str) -> File:
        """As `get`, and nobody can delete it before the caller's transaction ends."""
        # SQLite has no row locks, and needs none here: its writers take turns.
        query = self._select(File).where(File.id == file_id).with_for_update(read=True)
        return self._there(query, file_id)

    def list(self, cursor: str | None = None, limit: int = 20, purpose: str | None = None) -> Page[File]:
        """Those that are there, newest first."""
        query = self._select(File).where(File.deleted_at.is_(None))
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        return self._page(query, File, cursor, limit)

    def delete(self, file_id: str) -> None:
        """Make the file a tombstone; jobs that used it keep its digest.

        FileInUseError while an unfinished job reads it; else as `get`.

        The caller deletes the bytes after the commit: a row without bytes would be worse than bytes
        without a row.
        """
        query = self._select(File).where(File.id == file_id).with_for_update()
        file = self._there(query, file_id)
        uses = or_(Job.forget_file == file_id, Job.retain_file == file_id, Job.evaluation_file == file_id)
        using = self.session.scalars(self._select(Job).where(uses, Job.status.not_in(FINAL)).limit(1)).first()
        if using is not None:
            raise FileInUseError(
                f"{file_id} is read by {using.id}, which is {using.status}.",
                f"Cancel {using.id} or wait for it.",
            )
        file.deleted_at, file.name = now(), ""
        self.session.flush()

    def _there(self, query: Select[File], file_id: str) -> File:
        file = self._one(query.execution_options(populate_existing=True), "file", file_id)
        if file.deleted_at is not None:
            raise FileDeletedError(
                f"{file_id} was deleted at {file.deleted_at:%Y-%m-%dT%H:%M:%SZ}.",
                "Upload the set again if it is still needed.",
            )
        return file
