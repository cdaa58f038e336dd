"""sha256 of large files: read once, hashed beside the copying, and remembered while a file does not change.

sha256 runs at under 2 GB/s a thread: over a whole model it costs more than all else that a writer does. Torch-free.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Self

from seuf_core.cache import cache_folder

PIECE = 1 << 20
# A file changed twice within its clock's grain may look unchanged: one this young is not remembered.
_YOUNG_NS = 2_000_000_000

Done = Callable[[int], None]  # bytes dealt with since the last call; may raise to stop


def sha256_of(path: Path, done: Done) -> str:
    """Digest of a file's content in hex, read once. Memory: 1 MiB."""
    digest, at, buffer = hashlib.sha256(), 0, memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while piece := read_into(stream.fileno(), buffer, at):
            digest.update(piece)
            at += len(piece)
            done(len(piece))
    return digest.hexdigest()


def read_into(file: int, buffer: memoryview, offset: int) -> memoryview:
    """What an open file holds from `offset` on, as much as fits: the part of `buffer` that it filled."""
    done = 0
    while done < len(buffer) and (read := os.preadv(file, [buffer[done:]], offset + done)):
        done += read
    return buffer[:done]


def remembered(path: Path) -> str | None:
    """The digest that `remember` kept of this file, if it is still the same one by device, inode, size and time.

    Not by its name, so every hard link of a file has it; and not by ctime, which each new link changes. Somebody who
    changes a file and sets its time back is not seen here: whoever must know reads the file (`sha256_of`).
    """
    with suppress(OSError):
        text = _place(path.stat()).read_text()
        if len(text) == 64:
            return text
    return None


def remember(path: Path, before: os.stat_result, digest: str) -> None:
    """Keep the digest of a file that was `before` when its reading began. A cache that cannot be written is none."""
    with suppress(OSError):
        place = _place(before)
        if place != _place(path.stat()) or time.time_ns() - before.st_mtime_ns < _YOUNG_NS:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=place.parent, delete=False) as draft:
            draft.write(digest)
        Path(draft.name).replace(place)


def _place(facts: os.stat_result) -> Path:
    key = f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns}"
    return cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()


class BackgroundDigest:
    """sha256 in a thread of its own, one piece behind its caller, who reads and writes the next one meanwhile."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Add a piece; waits until the one before is done, so two are in memory at most.

        A view is read until the next call returns.
        """
        self._wait()
        self._last = self._pool.submit(self._digest.update, piece)

    def hexdigest(self) -> str:
        """Of all pieces."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
