"""A set on its way in, whatever route brings it: checked while it comes, kept only when it is right."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sqlalchemy.orm import Session

from api.context import Caller, Service, audit
from api.problems import FieldError, Problem, at
from api.settings import ApiSettings
from seuf_core.data.formats import Format
from seuf_core.data.reader import FileSummary, SetReader
from seuf_core.data.records import Limits, Purpose
from seuf_core.errors import DataError
from store.errors import StoreError
from store.files import Files, Sent, artefact_key
from store.ids import new_id
from store.tables import File
from store.tenants import Quota


class Incoming:
    """One set: bytes go through its reader, and as JSON Lines to an unnamed file on disk.

    That file is gone by itself when the block ends, however it ends, a killed process included.
    """

    def __init__(self, settings: ApiSettings, purpose: Purpose, format: Format, max_bytes: int) -> None:  # noqa: A002
        """`max_bytes`: of what is sent; as JSON Lines it may have SEUF_MAX_FILE_BYTES.

        Raises:
            Problem: 422 for an evaluation set as plain text.
        """
        self.settings = settings
        self.max_bytes = max_bytes
        folder = spool_folder(settings)
        self.lines: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        limits = Limits(max_bytes=max_bytes, max_stored_bytes=settings.max_file_bytes)
        try:
            self._reader = SetReader(purpose, format, limits, out=self.lines, scratch=folder)
        except DataError as error:
            self.lines.close()
            raise self._problem(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        self.lines.close()

    def write(self, piece: bytes) -> None:
        """The next bytes as they are sent. Problem (413, 422) as soon as nothing after them could help."""
        try:
            self._reader.feed(piece)
        except DataError as error:
            raise self._problem(error) from None

    def finish(self) -> FileSummary:
        """What the set holds, and whether it is right."""
        try:
            return self._reader.finish()
        except DataError as error:
            raise self._problem(error) from None

    def _problem(self, error: DataError) -> Problem:
        if error.code == "file_too_large":
            return too_large(self.settings, self.max_bytes)
        return at("/file", 422, error.code, error.message, error.fix)


def spool_folder(settings: ApiSettings) -> Path:
    """Where bytes wait that are coming in."""
    folder = settings.data_dir / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def too_large(settings: ApiSettings, max_bytes: int) -> Problem:
    """413 of a set over the cap of one request, or over that of a whole file."""
    if max_bytes < settings.max_file_bytes:
        fix = "Send it in parts: POST /uploads (`seuf files upload` and the client do so by themselves)."
    else:
        fix = "Split it into several files, or raise SEUF_MAX_FILE_BYTES."
    limit = min(settings.max_file_bytes, max_bytes)
    detail = f"The file is over the limit of {limit} bytes."
    return at("/file", 413, "file_too_large", detail, fix)


def refusal(summary: FileSummary, pointer: str) -> Problem:
    """422 with the first broken lines of a set."""
    errors = [
        FieldError(
            code=error.code, detail=error.message, pointer=pointer, line=error.line or None, field=error.field
        )
        for error in summary.errors
    ]
    first = summary.errors[0]
    place = summary.place(first)
    more = f" ({summary.error_count} errors in all)" if summary.error_count > 1 else ""
    return Problem(
        422,
        "invalid_examples",
        f"{place}{': ' if place else ''}{first.message}{more}",
        "Correct the lines named in `errors` and upload the file again; nothing was kept.",
        errors=errors,
    )


class Placing:
    """The bytes that are in place, and have no row yet."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ids: list[str] = []

    def put(self, content: BinaryIO) -> str:
        """Put the JSON Lines of a checked set in place, under the id returned."""
        file_id = new_id("file")
        content.seek(0)
        with self._service.artefacts.open_write(artefact_key(file_id)) as out:
            shutil.copyfileobj(content, out, 1 << 20)
        self._ids.append(file_id)
        return file_id

    def undo(self) -> None:
        """Take them away again."""
        while self._ids:
            self._service.artefacts.delete(artefact_key(self._ids.pop()))


@contextmanager
def placed(service: Service) -> Iterator[Placing]:
    """Puts bytes in place before their rows are written, and takes them away again when the block refuses.

    After anything else (a database that went away in the middle of a commit) a row may be there that needs them: they
    stay, and the sweep of orphans looks later.
    """
    placing = Placing(service)
    try:
        yield placing
    except (Problem, StoreError):
        placing.undo()
        raise


def record(
    service: Service, session: Session, caller: Caller, file_id: str, summary: FileSummary, name: str
) -> File:
    """The row of a set whose bytes are in place, in the caller's transaction. QuotaExceededError."""
    Quota(session, caller.tenant).check(service.settings.limits(), stored_bytes=summary.bytes)
    row = Files(session, caller.tenant).create(
        file_id,
        summary.purpose,
        name,
        summary.sha256,
        summary.bytes,
        summary.examples,
        summary.tokens_estimate,
        Sent(summary.format, summary.sent_sha256, summary.sent_bytes),
    )
    audit(session, caller, "file.create", file_id)
    return row


def shown_name(given: str) -> str:
    """The last part of what the client calls its file, for people to recognise; it never becomes a path."""
    name = given.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:255] or "upload.jsonl"
