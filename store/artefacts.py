"""Files and checkpoint folders, in a local folder or any fsspec storage.

What is there under its name is complete.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from fsspec.core import url_to_fs

_DRAFTS = ".drafts"


class Artefacts:
    """Keys are relative paths such as files/<id>.jsonl or checkpoints/<id>.

    Writes go to a draft name first and are renamed when complete: nothing half-written ever has a key.
    """

    def __init__(self, url: str) -> None:
        """`url`: a local folder (made if missing) or an fsspec address such as s3://bucket/prefix."""
        self._fs, root = url_to_fs(url)
        self._root = str(root).rstrip("/")
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else ())
        self._fs.makedirs(f"{self._root}/{_DRAFTS}", exist_ok=True)

    @contextmanager
    def open_write(self, key: str) -> Iterator[BinaryIO]:
        """Write one artefact; it appears when the block ends and not at all when the block raises."""
        target, draft = self._full(key), self._draft()
        try:
            with self._fs.open(draft, "wb") as file:
                yield cast("BinaryIO", file)
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            self._rename(draft, target)
        finally:
            if self._fs.exists(draft):
                self._fs.rm(draft)

    def open_read(self, key: str) -> BinaryIO:
        """Read one artefact (seekable). FileNotFoundError if there is none."""
        return cast("BinaryIO", self._fs.open(self._full(key), "rb"))

    def exists(self, key: str) -> bool:
        """Is there an artefact or folder of this key?"""
        return bool(self._fs.exists(self._full(key)))

    def path(self, key: str) -> Path:
        """Where the artefact lies on this machine's disk.

        ValueError when the storage is not a local folder.
        """
        if not self._local:
            raise ValueError(f"{key} is not on a local disk. Set SEUF_ARTEFACTS_URL to a folder.")
        return Path(self._full(key))

    def put_folder(self, folder: Path, key: str) -> None:
        """Move the local `folder` to `key`.

        On the same disk that is one rename; else a copy, then a rename.
        """
        target, draft = self._full(key), self._draft()
        try:
            if self._local:
                shutil.move(folder, draft)
            else:
                self._fs.put(str(folder), draft, recursive=True)
            self._rename(draft, target)
        finally:
            if self._fs.exists(draft):
                self._fs.rm(draft, recursive=True)
        shutil.rmtree(folder, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Delete an artefact or folder; nothing happens if there is none."""
        if self.exists(key):
            self._fs.rm(self._full(key), recursive=True)

    def _rename(self, draft: str, target: str) -> None:
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if self._local:
            Path(draft).replace(target)
        else:
            self._fs.mv(draft, target, recursive=True)

    def _draft(self) -> str:
        return f"{self._root}/{_DRAFTS}/{secrets.token_hex(8)}"

    def _full(self, key: str) -> str:
        """The storage path of a key; ValueError for a key that would leave the root or hide in it."""
        parts = PurePosixPath(key).parts
        if not parts or any(part.startswith((".", "/")) for part in parts) or "\\" in key:
            raise ValueError(
                f"{key!r} is not an artefact key. Keys are relative paths without dots in front."
            )
        return f"{self._root}/{'/'.join(parts)}"
