"""Uploaded sets of one tenant. The bytes are artefacts (files/<id>.jsonl); this is what is known of them."""

from sqlalchemy import or_

from store.errors import FileInUseError
from store.repository import Page, Repository
from store.tables import File, Job
from store.transitions import FINAL


def artefact_key(file_id: str) -> str:
    """Where a file's bytes are among the artefacts."""
    return f"files/{file_id}.jsonl"


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
    ) -> File:
        """Record a file whose bytes are already in place. `size` in bytes."""
        return self._add(
            File(
                id=file_id,
                purpose=purpose,
                name=name,
                sha256=sha256,
                bytes=size,
                uploaded_sha256=sha256,
                uploaded_bytes=size,
                examples=examples,
                tokens_estimate=tokens_estimate,
            )
        )

    def get(self, file_id: str) -> File:
        """The file, or NotFoundError."""
        return self._one(self._select(File).where(File.id == file_id), "file", file_id)

    def list(self, cursor: str | None = None, limit: int = 20, purpose: str | None = None) -> Page[File]:
        """Newest first."""
        query = self._select(File)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        return self._page(query, File, cursor, limit)

    def delete(self, file_id: str) -> None:
        """Forget the file; jobs that used it keep its digest.

        FileInUseError while an unfinished job reads it.

        The caller deletes the bytes after the commit: a row without bytes would be worse than bytes
        without a row.
        """
        file = self.get(file_id)
        uses = or_(Job.forget_file == file_id, Job.retain_file == file_id, Job.evaluation_file == file_id)
        using = self.session.scalars(self._select(Job).where(uses, Job.status.not_in(FINAL)).limit(1)).first()
        if using is not None:
            raise FileInUseError(
                f"{file_id} is read by {using.id}, which is {using.status}.",
                f"Cancel {using.id} or wait for it.",
            )
        self.session.execute(self._delete(File).where(File.id == file.id))
