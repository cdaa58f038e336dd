"""Sending a file in parts: each is checked by its digest and repeated over broken connections; a cut is taken up again.

Which parts are there is asked of the service, so a second call, even of another process, goes on where the first one
was cut off: it finds the open upload by purpose, size and digest of the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from client.errors import ApiError
from client.types import File, Format, Page, Purpose, Upload

PARTS_OVER = 64 << 20  # bytes; a file of this size goes in one request

Sent = Callable[[str, int, int], None]
"""(file name, bytes there, bytes in total)"""


class Ask(Protocol):
    """What parts need from the client: one request, its checked answer as JSON.

    `repeat`: it does no harm twice, so it is sent again over broken connections.
    """

    def __call__(
        self,
        method: str,
        path: str,
        *,
        repeat: bool,
        json: Any = None,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        patient: bool = False,
    ) -> Any: ...


def send_in_parts(
    ask: Ask,
    path: Path,
    purpose: Purpose,
    format: Format | None,  # noqa: A002
    progress: Sent | None,
) -> File:
    """Send `path`, or what is still missing of it, and have it made a file.

    Raises:
        ApiError: the service refused. An upload whose content it refused is given up.
        UnreachableError: the connection kept breaking; call again to go on.
    """
    size, digest = path.stat().st_size, _sha256(path)
    wanted = {"purpose": purpose, "filename": path.name, "bytes": size, "sha256": digest}
    if format is not None:
        wanted["format"] = format
    upload = _open(ask, wanted) or cast("Upload", ask("POST", "/uploads", repeat=False, json=wanted))
    _send_parts(ask, upload, path, size, progress)
    try:
        done = ask("POST", f"/uploads/{upload['id']}/complete", repeat=True, patient=True)
    except ApiError as error:
        if error.code != "upload_changed":
            ask("DELETE", f"/uploads/{upload['id']}", repeat=False)
        raise
    return cast("File", done)


def _open(ask: Ask, wanted: dict[str, Any]) -> Upload | None:
    """The open upload of this very file, if there is one whose parts are cut as ours would be."""
    cursor = ""
    while True:
        page = cast("Page[Upload]", ask("GET", f"/uploads?limit=100{cursor}", repeat=True))
        for upload in page["data"]:
            same = all(upload.get(name) == value for name, value in wanted.items())
            last = -(-wanted["bytes"] // upload["part_bytes"])
            if same and all(part["number"] <= last for part in upload["parts"]):
                return upload
        if page["next"] is None:
            return None
        cursor = f"&cursor={page['next']}"


def _send_parts(ask: Ask, upload: Upload, path: Path, size: int, progress: Sent | None) -> None:
    there = {part["number"]: part["sha256"] for part in upload["parts"]}
    sent = number = 0
    with path.open("rb") as stream:
        while piece := stream.read(upload["part_bytes"]):
            number += 1
            digest = hashlib.sha256(piece)
            if there.get(number) != digest.hexdigest():
                value = base64.b64encode(digest.digest()).decode()
                headers = {"Content-Digest": f"sha-256=:{value}:", "Content-Type": "application/octet-stream"}
                where = f"/uploads/{upload['id']}/parts/{number}"
                ask("PUT", where, repeat=True, content=piece, headers=headers)
            sent += len(piece)
            if progress is not None:
                progress(path.name, sent, size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
