"""Artefacts in a local folder: drafts that are renamed when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DRAFTS = ".drafts"


class Folder:
    """A local folder (or one mounted from a server), made if missing."""

    faults: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / DRAFTS).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def write(self, path: str) -> Iterator[BinaryIO]:
        """See store.artefacts.Place."""
        draft = self._draft()
        try:
            with draft.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            self._rename(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def read(self, path: str) -> BinaryIO:
        """See store.artefacts.Place."""
        return (self.root / path).open("rb")

    def exists(self, path: str) -> bool:
        """See store.artefacts.Place."""
        return (self.root / path).exists()

    def put_folder(self, folder: Path, path: str) -> None:
        """See store.artefacts.Place. On another disk: a copy, then a rename."""
        try:
            self._rename(folder, path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
        draft = self._draft()
        try:
            shutil.copytree(folder, draft)
            for file in draft.rglob("*"):
                _sync(file)
            self._rename(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, path: str, target: Path) -> None:
        """See store.artefacts.Place. One file under two names, where the disk allows that."""
        try:
            target.hardlink_to(self.root / path)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(self.root / path, target)

    def delete(self, path: str) -> None:
        """See store.artefacts.Place. A folder loses its name first: nobody sees half of it."""
        target = self.root / path
        if not target.is_dir():
            target.unlink(missing_ok=True)
            return
        draft = self._draft()
        target.rename(draft)
        shutil.rmtree(draft)

    def ages(self, prefix: str) -> dict[str, float]:
        """See store.artefacts.Place."""
        folder = self.root / prefix
        return _ages(folder) if folder.is_dir() else {}

    def sweep_drafts(self, age_seconds: float) -> int:
        """See store.artefacts.Place."""
        old = [name for name, age in _ages(self.root / DRAFTS).items() if age >= age_seconds]
        for name in old:
            self.delete(f"{DRAFTS}/{name}")
        return len(old)

    def signed_url(self, path: str, seconds: int, headers: dict[str, str]) -> None:  # noqa: ARG002
        """A folder has no addresses."""
        return

    def _draft(self) -> Path:
        return self.root / DRAFTS / secrets.token_hex(8)

    def _rename(self, source: Path, path: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        _sync(target.parent)


def _ages(folder: Path) -> dict[str, float]:
    """What is deleted meanwhile is left out."""
    now = time.time()
    found = {}
    for entry in folder.iterdir():
        try:
            times = [item.stat().st_mtime for item in (entry, *entry.rglob("*"))]
        except FileNotFoundError:
            continue
        found[entry.name] = max(0.0, now - max(times))
    return found


def _sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
