"""Reading `multipart/form-data` (one file, one purpose) as it arrives: a few pieces of it in memory.

FastAPI's own form parsing takes the whole body before a route runs; here the cap, the digest and the check
of every line happen while the bytes come in, so that memory stays flat and a body over the cap ends early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final, get_args

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.problems import FieldError, Problem, at
from api.schemas import Purpose
from seuf_core.data.reader import READ_BYTES, FileSummary, RecordReader
from seuf_core.data.records import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers only

_FIELD_BYTES: Final = 256
_SAY: Final = "Send multipart/form-data: curl -F purpose=forget -F file=@forget.jsonl"


class Intake:
    """Takes the parts of one upload; file bytes go to `out` and through the validator."""

    def __init__(self, limits: Limits, out: BinaryIO) -> None:
        self.filename = ""
        self.purpose: Purpose | None = None
        self._limits = limits
        self._out = out
        self._reader: RecordReader | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._part = ""
        self._bytes = 0
        self._field = bytearray()
        self._seen: set[str] = set()

    def callbacks(self) -> MultipartCallbacks:
        """What the multipart parser calls."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
        }

    def finish(self) -> FileSummary:
        """The result of the validator, once the body has ended."""
        for wanted in ("purpose", "file"):
            if wanted not in self._seen:
                raise at(f"/{wanted}", 422, "missing", f"The upload has no part {wanted!r}.", _SAY)
        assert self.purpose is not None
        if self._reader is None:  # `purpose` came after `file`: check it from disk instead
            self._reader = RecordReader(self.purpose, self._limits)
            self._out.seek(0)
            while piece := self._out.read(READ_BYTES):
                self._reader.feed(piece)
        return self._reader.finish()

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._field = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part not in ("purpose", "file"):
            raise at(f"/{self._part}", 422, "extra_forbidden", f"Unknown part {self._part!r}.", _SAY)
        if self._part in self._seen:
            raise at(f"/{self._part}", 422, "duplicate_part", f"Part {self._part!r} came twice.", _SAY)
        self._seen.add(self._part)
        if self._part == "file":
            given = options.get(b"filename", b"").decode("utf-8", "replace")
            self.filename = _shown_name(given)
            if self.purpose is not None:
                self._reader = RecordReader(self.purpose, self._limits)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part == "purpose":
            self._field += piece
            if len(self._field) > _FIELD_BYTES:
                raise _bad_purpose("too long")
            return
        self._bytes += len(piece)
        if self._bytes > self._limits.max_bytes:
            raise too_large(self._limits.max_bytes)
        self._out.write(piece)
        if self._reader is not None:
            self._reader.feed(piece)

    def _on_part_end(self) -> None:
        if self._part == "purpose":
            given = self._field.decode("utf-8", "replace").strip()
            if given not in get_args(Purpose):
                raise _bad_purpose(repr(given))
            self.purpose = given  # type: ignore[assignment]  # one of Purpose's values, just checked


def _shown_name(given: str) -> str:
    """The last part of what the client calls its file, for people to recognise; it never becomes a path."""
    name = given.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:255] or "upload.jsonl"


def too_large(max_bytes: int) -> Problem:
    """413 of a set over the cap."""
    detail = f"The file is over the limit of {max_bytes} bytes."
    return at(
        "/file", 413, "file_too_large", detail, "Split it into several files, or raise SEUF_MAX_UPLOAD_BYTES."
    )


def _bad_purpose(given: str) -> Problem:
    known = ", ".join(get_args(Purpose))
    return at("/purpose", 422, "unknown_purpose", f"purpose is {given}.", f"Use one of {known}.")


async def receive(request: Request, intake: Intake, max_bytes: int) -> FileSummary:
    """Drive `intake` with the body of `request`.

    Raises:
        Problem: 413 over the cap, 415 when it is not multipart, 400 when it is broken, 422 for its content.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise Problem(415, "not_multipart", "An upload must be multipart/form-data.", _SAY)
    declared = request.headers.get("content-length", "")
    # 64 KiB for the part headers and the purpose around the file.
    if declared.isdigit() and int(declared) > max_bytes + 65536:
        raise too_large(max_bytes)
    try:
        parser = MultipartParser(options[b"boundary"], intake.callbacks())
        async for piece in request.stream():
            await run_in_threadpool(parser.write, piece)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, "broken_multipart", "The multipart body is broken.", _SAY) from error
    except ClientDisconnect as error:  # nobody reads the answer; it only keeps a crash out of the log
        raise Problem(400, "upload_cut_off", "The connection ended before the upload did.", _SAY) from error
    return await run_in_threadpool(intake.finish)


def refusal(summary: FileSummary, pointer: str) -> Problem:
    """422 with the first broken lines of a set."""
    errors = [
        FieldError(code=error.code, detail=error.message, pointer=pointer, line=error.line or None)
        for error in summary.errors
    ]
    first = summary.errors[0]
    where = f"line {first.line}: " if first.line else ""
    more = f" ({summary.error_count} errors in all)" if summary.error_count > 1 else ""
    return Problem(
        422,
        "invalid_examples",
        f"{where}{first.message}{more}",
        "Correct the lines named in `errors` and upload the file again; nothing was kept.",
        errors=errors,
    )
