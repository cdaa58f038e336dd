"""Fetching a checkpoint: resumes by Range, checks every digest, and appears whole or not at all.

Files arrive in a hidden folder beside the target, named after the checkpoint, so that a second call goes on
where the first one was cut off. The folder is renamed to the target only when every sha256 is right.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

import httpx

from client.errors import ApiError, DownloadError
from client.types import Checkpoint, CheckpointFile

ATTEMPTS = 5  # consecutive connections that bring not one byte, before giving up
BUSY = frozenset({429, 500, 502, 503, 504})  # what a service or a store says that will do it in a moment

Progress = Callable[[str, int, int], None]
"""(file name, bytes there, bytes in total)"""


class _Busy(Exception):  # noqa: N818  (a state of the other side)
    """A refusal that may be over in a moment."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Fetch(Protocol):
    """What a download needs from the client: an open streaming GET, redirects followed."""

    def __call__(self, path: str, headers: dict[str, str]) -> httpx.Response: ...


def download(fetch: Fetch, checkpoint: Checkpoint, folder: Path, progress: Progress | None) -> Path:
    """Fetch all files of `checkpoint` into `folder`, which must not exist yet (or be empty).

    Raises:
        DownloadError: the folder is taken, a digest is wrong, or the connection kept breaking.
        ApiError: the service refused.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DownloadError(f"{folder} exists already.", "Give a new folder, or remove that one first.")
    part = folder.parent / f".{folder.name}.{checkpoint['id']}.part"
    part.mkdir(parents=True, exist_ok=True)
    # The manifest comes last: whoever looks into the hidden folder can tell that it is not complete.
    for file in sorted(checkpoint["files"], key=lambda file: file["name"] == "manifest.json"):
        _fetch_file(fetch, checkpoint["id"], file, _inside(part, file["name"]), progress)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)
    _sync(folder.parent)
    return folder


def _inside(folder: Path, name: str) -> Path:
    """Where `name` goes; a name that leads out of the folder is refused, whoever sent it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DownloadError(
            f"The manifest names a file {name!r} outside its folder.", "Do not trust this server."
        )
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _fetch_file(
    fetch: Fetch, checkpoint_id: str, file: CheckpointFile, path: Path, progress: Progress | None
) -> None:
    url = f"/checkpoints/{checkpoint_id}/files/{file['name']}"
    failures = 0
    while (there := path.stat().st_size if path.exists() else 0) < file["bytes"] or not path.exists():
        try:
            _append(fetch, url, file, path, there, progress)
        except (httpx.TransportError, _Busy) as error:
            grown = path.exists() and path.stat().st_size > there
            failures = 0 if grown else failures + 1
            if failures >= ATTEMPTS and isinstance(error, _Busy):
                raise error.refusal from error
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{file['name']} broke off at byte {there} of {file['bytes']} ({error}).",
                    "Run the same download again: it goes on from there.",
                ) from error
            time.sleep(min(0.2 * 2**failures, 5.0))
    digest = _sha256(path)
    if digest != file["sha256"]:
        path.unlink()
        raise DownloadError(
            f"{file['name']} has sha256 {digest}, but the manifest says {file['sha256']}.",
            "The bad file was removed; run the same download again.",
        )
    if progress is not None:
        progress(file["name"], file["bytes"], file["bytes"])


def _append(
    fetch: Fetch, url: str, file: CheckpointFile, path: Path, there: int, progress: Progress | None
) -> None:
    """One connection's worth of bytes, from `there` on; starts over when the server sends the whole file."""
    # If-Range: a file that changed meanwhile comes whole (200) instead of being glued onto the old half.
    headers = {"Accept-Encoding": "identity"}
    if there:
        headers |= {"Range": f"bytes={there}-", "If-Range": f'"{file["sha256"]}"'}
    response = fetch(url, headers)
    try:
        if response.status_code not in (200, 206):
            response.read()
            refusal = ApiError.from_response(response)
            raise _Busy(refusal) if response.status_code in BUSY else refusal
        if response.status_code == 200:
            there = 0
        with path.open("ab" if there else "wb") as out:
            # As they come: bytes that httpx gathers into larger pieces are lost when the connection breaks.
            for chunk in response.iter_raw():
                out.write(chunk)
                there += len(chunk)
                if there > file["bytes"]:
                    raise DownloadError(
                        f"{file['name']} is longer than its manifest says ({file['bytes']} bytes)."
                    )
                if progress is not None:
                    progress(file["name"], there, file["bytes"])
            out.flush()
            os.fsync(out.fileno())
    finally:
        response.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make the rename durable: a power cut after this call leaves the checkpoint in place."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
