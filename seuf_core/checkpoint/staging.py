"""A folder that appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seuf_core.errors import WriteError

PARTIAL = ".partial"
# Stands in a partial folder, so that an old one of ours can be told from a folder somebody named like it.
MARKER = ".seuf-partial"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new, empty folder `out` + ".partial": renamed to `out` after the block, removed when it raises.

    A killed process leaves its folder behind, and the next writer of the same `out` empties it. The kernel's
    lock on the folder tells that from a writer at work: it ends with its process.

    Raises:
        WriteError: output_exists, output_busy (another process is writing it), disk_full, write_failed.
    """
    _refuse_existing(out)
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
        try:
            _empty(partial)
            yield partial
            sync(partial)
            _refuse_existing(out)
            partial.rename(out)
            sync(out.parent)
            (out / MARKER).unlink()
        except BaseException:
            if (partial / MARKER).exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise _write_error(out, error) from error


def partial_of(out: Path) -> Path:
    """Where `out` is written before it has its name."""
    return out.with_name(out.name + PARTIAL)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def refuse_if_full(folder: Path, size: int) -> None:
    """Raise WriteError(disk_full) when `size` bytes are not free: before the writing, not after hours."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise WriteError(
            "disk_full",
            f"{size} bytes are needed and {folder} has {free} free.",
            "Free space, or write elsewhere.",
        )


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise WriteError("output_exists", f"{out} exists already.", "Remove it, or choose another folder.")


def _lock(partial: Path) -> int:
    folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    with suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock may have renamed the folder between our open and our lock.
        if os.path.samestat(os.fstat(folder), partial.stat()):
            return folder
    os.close(folder)
    raise WriteError(
        "output_busy", f"Another process is writing {partial}.", "Wait for it, or choose another folder."
    )


def _empty(partial: Path) -> None:
    entries = list(partial.iterdir())
    if entries and not (partial / MARKER).exists():
        raise WriteError(
            "output_busy", f"{partial} is in the way and was not left by an earlier run.", "Move it away."
        )
    (partial / MARKER).touch()
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


def _write_error(out: Path, error: OSError) -> WriteError:
    if error.errno in _FULL:
        return WriteError("disk_full", f"{out} does not fit on its disk.", "Free space, or write elsewhere.")
    return WriteError(
        "write_failed", f"{out} could not be written: {error}.", "Check the folder's permissions."
    )
