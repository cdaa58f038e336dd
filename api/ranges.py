"""Serving one immutable file: strong ETag, Range, If-Range, If-None-Match, HEAD (RFC 9110, RFC 9530)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from api.problems import Problem

CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class ServedFile:
    """A file whose digest is known: `open` gives it (seekable), `bytes` is its size, `sha256` hexadecimal."""

    open: Callable[[], BinaryIO]
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
            # Private: an unlearned model is nothing for a shared cache. Immutable: the id names these bytes.
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Disposition": f'attachment; filename="{self.name.rpartition("/")[2]}"',
        }


def serve(request: Request, file: ServedFile) -> Response:
    """Answer GET or HEAD for `file`.

    Raises:
        Problem: 416 when the range lies outside the file.
    """
    headers = file.headers()
    media_type = "application/json" if file.name.endswith(".json") else "application/octet-stream"
    if _names(request.headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        # Range is defined for GET only (RFC 9110, 14.2).
        headers["Content-Length"] = str(file.bytes)
        return Response(headers=headers, media_type=media_type)
    span = _span(request, file)
    status, (start, end) = (200, (0, file.bytes)) if span is None else (206, span)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    headers["Content-Length"] = str(end - start)
    return StreamingResponse(_read(file, start, end), status, headers=headers, media_type=media_type)


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


def _read(file: ServedFile, start: int, end: int) -> Iterator[bytes]:
    with file.open() as stream:
        stream.seek(start)
        left = end - start
        while left and (chunk := stream.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
