"""Reading `multipart/form-data` (one file, its purpose, its format) as it arrives: a few pieces of it in memory.

FastAPI's own form parsing takes the whole body before a route runs; here the cap, the digest and the check
of every line happen while the bytes come in, so that memory stays flat and a body over the cap ends early.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final, Self, get_args

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.problems import Problem, at
from api.schemas import Purpose
from api.sets import Incoming, shown_name, spool_folder, too_large
from api.settings import ApiSettings
from seuf_core.data.formats import Format, format_of
from seuf_core.data.reader import READ_BYTES, FileSummary

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers only

_FIELD_BYTES: Final = 256
_PARTS: Final = ("purpose", "format", "file")
_SAY: Final = "Send multipart/form-data: curl -F purpose=forget -F file=@forget.jsonl"


class Intake:
    """Takes the parts of one upload; the bytes of the file go to `incoming` as they come."""

    def __init__(self, settings: ApiSettings) -> None:
        self.filename = ""
        self.purpose: Purpose | None = None
        self.format: Format | None = None
        self.incoming: Incoming | None = None
        self._settings = settings
        self._late: BinaryIO | None = None  # the file, where its purpose comes after it
        self._open = ExitStack()
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._part = ""
        self._bytes = 0
        self._field = bytearray()
        self._seen: set[str] = set()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

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
            "on_end": self._on_end,
        }

    def finish(self) -> tuple[Incoming, FileSummary]:
        """The set and what it holds, once the body has ended."""
        if not self._ended:
            detail = "The multipart body does not end with its boundary: it was cut off."
            raise Problem(400, "broken_multipart", detail, _SAY)
        for wanted in ("purpose", "file"):
            if wanted not in self._seen:
                raise at(f"/{wanted}", 422, "missing", f"The upload has no part {wanted!r}.", _SAY)
        if self._late is not None:
            self._begin()
            assert self.incoming is not None
            self._late.seek(0)
            while piece := self._late.read(READ_BYTES):
                self.incoming.write(piece)
        assert self.incoming is not None
        return self.incoming, self.incoming.finish()

    def _on_end(self) -> None:
        self._ended = True

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
        if self._part not in _PARTS:
            raise at(f"/{self._part}", 422, "extra_forbidden", f"Unknown part {self._part!r}.", _SAY)
        if self._part in self._seen:
            raise at(f"/{self._part}", 422, "duplicate_part", f"Part {self._part!r} came twice.", _SAY)
        self._seen.add(self._part)
        if self._part == "format" and "file" in self._seen:
            raise at(
                "/format", 422, "part_order", "Part 'format' came after the file.", "Send it before the file."
            )
        if self._part == "file":
            self._on_file(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _on_file(self, given: str) -> None:
        self.filename = shown_name(given)
        if self.format is None:
            media_type = self._headers.get(b"content-type", b"").decode("latin-1")
            self.format = format_of(self.filename, media_type)
        if self.purpose is not None:
            self._begin()
        else:
            folder = spool_folder(self._settings)
            self._late = self._open.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115

    def _begin(self) -> None:
        assert self.purpose is not None
        assert self.format is not None
        limit = self._settings.max_upload_bytes
        self.incoming = self._open.enter_context(Incoming(self._settings, self.purpose, self.format, limit))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part != "file":
            self._field += piece
            if len(self._field) > _FIELD_BYTES:
                raise _unknown(self._part, "too long")
            return
        self._bytes += len(piece)
        if self._bytes > self._settings.max_upload_bytes:
            raise too_large(self._settings, self._settings.max_upload_bytes)
        if self.incoming is not None:
            self.incoming.write(piece)
        else:
            assert self._late is not None
            self._late.write(piece)

    def _on_part_end(self) -> None:
        if self._part == "file":
            return
        given = self._field.decode("utf-8", "replace").strip()
        if given not in _VALUES[self._part]:
            raise _unknown(self._part, repr(given))
        setattr(self, self._part, given)


_VALUES: Final[dict[str, tuple[str, ...]]] = {"purpose": get_args(Purpose), "format": get_args(Format)}


def _unknown(part: str, given: str) -> Problem:
    known = ", ".join(_VALUES[part])
    return at(f"/{part}", 422, f"unknown_{part}", f"{part} is {given}.", f"Use one of {known}.")


async def receive(request: Request, intake: Intake, settings: ApiSettings) -> tuple[Incoming, FileSummary]:
    """Drive `intake` with the body of `request`.

    Raises:
        Problem: 413 over the cap, 415 when it is not multipart, 400 when it is broken, 422 for its content.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise Problem(415, "not_multipart", "An upload must be multipart/form-data.", _SAY)
    refuse_encoded(request)
    declared = request.headers.get("content-length", "")
    # 64 KiB for the part headers, the purpose and the format around the file.
    if declared.isdigit() and int(declared) > settings.max_upload_bytes + 65536:
        raise too_large(settings, settings.max_upload_bytes)
    try:
        parser = MultipartParser(options[b"boundary"], intake.callbacks())
        async for piece in request.stream():
            await run_in_threadpool(parser.write, piece)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, "broken_multipart", "The multipart body is broken.", _SAY) from error
    except ClientDisconnect as error:
        raise cut_off() from error
    return await run_in_threadpool(intake.finish)


def refuse_encoded(request: Request) -> None:
    """415 for a body that is compressed: its size would say nothing about that of the set."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise Problem(
            415, "encoded_body", "The body has a Content-Encoding.", "Send the file uncompressed, without it."
        )


def cut_off() -> Problem:
    """400 that nobody reads: the connection ended. It only keeps a crash out of the log."""
    return Problem(
        400, "upload_cut_off", "The connection ended before the upload did.", "Send it again, or in parts."
    )
