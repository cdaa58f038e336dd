"""Serving one immutable file: strong ETag, Range, If-Range, If-None-Match, HEAD (RFC 9110, RFC 9530).

Its bytes go through this process a piece at a time, or the client is sent on to the object store that has them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import BinaryIO, Final
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from api.problems import Problem

CHUNK: Final = 1 << 20
"""Bytes read at once, each time in a thread: smaller pieces cost speed (half of it at 256 KiB), larger ones mostly
memory. benchmarks/service.py compares with nginx.
"""


@dataclass(frozen=True)
class ServedFile:
    """A file whose digest is known.

    Attributes:
        open: gives its bytes (seekable).
        signed_url: where the bytes lie elsewhere: an address whose answer has the given headers; else None.
        name: as the manifest has it, with slashes.
        bytes: its size.
        sha256: hexadecimal.
    """

    open: Callable[[], AbstractContextManager[BinaryIO]]
    signed_url: Callable[[dict[str, str]], str | None]
    name: str
    bytes: int
    sha256: str

    @property
    def etag(self) -> str:
        """Strong entity tag: the same bytes have the same tag, on every replica and for ever."""
        return f'"{self.sha256}"'

    def headers(self) -> dict[str, str]:
        """What every answer about this file says; Repr-Digest is of the whole file, on a 206 too."""
        digest = base64.b64encode(bytes.fromhex(self.sha256)).decode()
        return {
            "ETag": self.etag,
            "Accept-Ranges": "bytes",
            "Repr-Digest": f"sha-256=:{digest}:",
            "X-Content-Type-Options": "nosniff",
            **self.content_headers(),
        }

    def content_headers(self) -> dict[str, str]:
        """Those that an object store can be asked to send as well."""
        return {
            "Content-Type": "application/json" if self.name.endswith(".json") else "application/octet-stream",
            # Private: an unlearned model is nothing for a shared cache. Immutable: the id names these bytes.
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Disposition": _attachment(self.name.rpartition("/")[2]),
        }


def serve(request: Request, file: ServedFile) -> Response:
    """Answer GET or HEAD for `file`.

    Raises:
        Problem: 416 when the range lies outside the file.
    """
    headers = file.headers()
    if _names(request.headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        # Range is defined for GET only (RFC 9110, 14.2).
        headers["Content-Length"] = str(file.bytes)
        return Response(headers=headers)
    span = _span(request, file)
    if (url := file.signed_url(file.content_headers())) is not None:
        # The client repeats its Range there. An address that opens a file is nothing to keep.
        return Response(status_code=307, headers={"Location": url, "Cache-Control": "no-store"})
    status, (start, end) = (200, (0, file.bytes)) if span is None else (206, span)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    headers["Content-Length"] = str(end - start)
    # Opened before the first header goes out: a storage that is away is a 503, not a 200 that breaks off.
    stack = ExitStack()
    stream = stack.enter_context(file.open())
    return StreamingResponse(_read(stack, stream, start, end), status, headers=headers)


def _attachment(name: str) -> str:
    """Content-Disposition of a file that is saved under `name`, whatever characters it has (RFC 6266)."""
    plain = "".join(c for c in name if c.isascii() and c.isprintable() and c not in '"\\%')
    return f'attachment; filename="{plain}"' + ("" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}")


def _names(if_none_match: str | None, etag: str) -> bool:
    if if_none_match is None:
        return False
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(","))


def _span(request: Request, file: ServedFile) -> tuple[int, int] | None:
    """[start, end) of the one range asked for; None = the whole file.

    A malformed header, another unit, several ranges, or an If-Range that names other bytes all mean the
    whole file: a server may always ignore Range (RFC 9110, 14.2).
    """
    asked, condition = request.headers.get("range"), request.headers.get("if-range")
    if asked is None or (condition is not None and condition.strip() != file.etag):
        return None
    unit, _, spec = asked.partition("=")
    first, dash, last = (part.strip() for part in spec.partition("-"))
    if (
        unit.strip().lower() != "bytes"
        or not dash
        or not all(p == "" or _is_number(p) for p in (first, last))
    ):
        return None
    if not first and not last:
        return None
    if first:
        start, end = int(first), min(int(last) + 1, file.bytes) if last else file.bytes
        if last and int(last) < start:
            return None
    else:
        start, end = max(file.bytes - int(last), 0), file.bytes
    if start >= end:
        raise Problem(
            416,
            "range_not_satisfiable",
            f"{file.name} has {file.bytes} bytes; {asked} lies outside.",
            "Ask for a range inside the file.",
            headers={"Content-Range": f"bytes */{file.bytes}", "ETag": file.etag},
        )
    return start, end


def _is_number(text: str) -> bool:
    # isdigit alone would take "²"; 19 digits are past any file and below what int() refuses.
    return text.isascii() and text.isdigit() and len(text) < 20


def _read(closing: ExitStack, stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with closing:
        stream.seek(start)
        left = end - start
        while left and (chunk := stream.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
