"""One file of a checkpoint, made from the base's: shared where it may be, else copied and patched in one pass."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch

from seuf_core.checkpoint.digests import PIECE, BackgroundDigest, Done, read_into
from seuf_core.checkpoint.index import TensorRecord
from seuf_core.checkpoint.reader import tensor_bytes, write_all
from seuf_core.checkpoint.staging import sync
from seuf_core.errors import WriteError

# How a file that equals the base's may come to be, each with what follows it as the second choice:
#   reflink   its own file on the same blocks, until one of the two is changed (btrfs, XFS, bcachefs); else a copy
#   hardlink  a reflink; else the base's file under a second name; else a copy
#   copy      always a copy
Share = Literal["reflink", "hardlink", "copy"]

# So much goes to the disk while the rest is still being copied. Measured: 64 MiB took .57 of the time of one fsync at
# the end, 256 MiB .88.
_FLUSH_BYTES = 64 << 20

_FICLONE = 0x40049409  # linux/fs.h; the fcntl module names it from Python 3.13 on
# The file system cannot, the two lie on different ones, or the kernel forbids a link to somebody else's file.
_CANNOT = frozenset(
    {
        errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL,
        errno.ENOSYS,
    }
)  # fmt: skip


def share_file(source: Path, target: Path, share: Share) -> Share:
    """Let the new file `target` share the bytes of `source`, and say how; "copy": there is no target yet.

    A hard link is one file: whoever writes into it later changes both. Its mode is the base's too.
    """
    source = source.resolve(strict=True)  # os.link on a symbolic link (hub caches) would link the link
    if share != "copy" and _reflink(source, target):
        how: Share = "reflink"
    elif share == "hardlink" and _hard_link(source, target):
        how = "hardlink"
    else:
        return "copy"
    sync(target)
    return how


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as base, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, base.fileno())
        except OSError as error:
            target.unlink()
            if error.errno in _CANNOT:
                return False
            raise
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def copy_patched(
    source: Path,
    target: Path,
    records: Sequence[TensorRecord],
    value: Callable[[TensorRecord], torch.Tensor],
    done: Done,
    *,
    reflinked: bool = False,
    known: str | None = None,
) -> str:
    """Write `source` with some tensors replaced to `target`; the sha256 of what was read back of it, in hex.

    One pass: each piece is written, read back, compared with what was meant, and hashed while the next one is written.
    So the digest is that of a file of which every byte is known to be the base's or the new value's.
    Memory: 3 MiB, the same ones for every piece, and one tensor.

    Args:
        records: the changed tensors, in file order; value: the new value of each, as the file holds it.
        reflinked: `target` is a reflink of `source` already, so only the tensors are written.
        known: the digest of `source` when it is copied as it is: what was read back equals it, so it is not hashed.

    Raises:
        WriteError: verification_failed.
    """
    mode = "r+b" if reflinked else "x+b"  # x: never into a file that is there, which could be somebody's link
    with (
        source.open("rb", buffering=0) as base,
        target.open(mode, buffering=0) as out,
        BackgroundDigest() as digest,
        _BackgroundFlush(out.fileno()) as flush,
    ):
        size = os.fstat(base.fileno()).st_size
        # Two to read back into: one of them is still being hashed.
        there, back = memoryview(bytearray(PIECE)), cycle(memoryview(bytearray(PIECE)) for _ in range(2))
        for begin, end, record in _spans(records, size):
            new = None if record is None else tensor_bytes(value(record))
            for at in range(begin, end, PIECE):
                length = min(PIECE, end - at)
                wanted = None
                if new is not None:
                    wanted = new[at - begin : at - begin + length]
                elif not reflinked:
                    wanted = read_into(base.fileno(), there[:length], at)
                if wanted is not None:
                    write_all(out.fileno(), wanted, at)
                found = read_into(out.fileno(), next(back)[:length], at)
                if len(found) != length or (wanted is not None and not _same(wanted, found)):
                    raise unverified(record.name if record else target.name)
                if known is None:
                    digest.update(found)
                flush.wrote(0 if wanted is None else length)
                done(length)
        flush.finish()
        if os.fstat(out.fileno()).st_size != size:
            raise unverified(target.name)
        return known or digest.hexdigest()


def _same(one: memoryview, other: memoryview) -> bool:
    # memoryviews compare number by number, bytes would have to be copied first.
    return np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))


class _BackgroundFlush:
    """Sends what was written to a file to the disk, in a thread of its own."""

    def __init__(self, file: int) -> None:
        self._file, self._waiting = file, 0
        self._pool = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []

    def wrote(self, size: int) -> None:
        """So many bytes more."""
        self._waiting += size
        if self._waiting >= _FLUSH_BYTES:
            self._waiting = 0
            self._flushes.append(self._pool.submit(os.fsync, self._file))

    def finish(self) -> None:
        """Everything is on the disk after this. Raises the OSError of any flush."""
        for flush in self._flushes:
            flush.result()
        os.fsync(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _spans(records: Sequence[TensorRecord], size: int) -> Iterator[tuple[int, int, TensorRecord | None]]:
    """A file from its first byte to its last, cut into (begin, end, changed tensor or None)."""
    at = 0
    for record in records:
        yield at, record.offset, None
        at = record.offset + record.bytes
        yield record.offset, at, record
    yield at, size, None


def unverified(what: str) -> WriteError:
    """The error of something that is on the disk otherwise than it was written."""
    return WriteError(
        "verification_failed",
        f"{what} does not read back as it was written.",
        "Check the disk and the memory.",
    )
