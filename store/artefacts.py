"""Files and checkpoint folders, in a local folder or in an object store that speaks S3.

What is there under its name is complete. Keys are relative paths such as files/<id>.jsonl or checkpoints/<id>.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, Self

from store.bucket import Bucket
from store.errors import StorageAway
from store.folder import Folder
from store.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A file or a folder of the storage; the age is that of its newest bytes."""

    key: str
    age_seconds: float


class Place(Protocol):
    """What a kind of storage can do with a path (a checked key)."""

    @property
    def faults(self) -> tuple[type[Exception], ...]:
        """What it raises when it cannot do its work. FileNotFoundError is an answer, and no fault."""

    def write(self, path: str) -> AbstractContextManager[BinaryIO]:
        """One file; there when the block ends, and not at all when it raises."""

    def read(self, path: str) -> BinaryIO:
        """One file (seekable), or FileNotFoundError."""

    def exists(self, path: str) -> bool:
        """Is there a file or a folder?"""

    def put_folder(self, folder: Path, path: str) -> None:
        """The local folder, moved. If that fails the local folder is as it was."""

    def fetch(self, path: str, target: Path) -> None:
        """One file as the local file `target`, or FileNotFoundError."""

    def delete(self, path: str) -> None:
        """The file or folder, if there is one."""

    def ages(self, prefix: str) -> dict[str, float]:
        """Name and age in seconds of each file and folder directly under `prefix`."""

    def sweep_drafts(self, age_seconds: float) -> int:
        """Delete what was begun so long ago and never completed; how many."""

    def signed_url(self, path: str, seconds: int, headers: dict[str, str]) -> str | None:
        """An address that gives the file with these headers, to anybody, for so long."""


class Artefacts:
    """The storage of this service. Every method may raise StorageAway.

    Raises (every method that takes a key):
        ValueError: the key would leave the root, or hide in it.
    """

    def __init__(self, url: str, endpoint_url: str = "", public_endpoint_url: str = "") -> None:
        """`url`: a local folder (made if missing) or s3://bucket/prefix.

        `endpoint_url`: of an S3 store that is not Amazon's; `public_endpoint_url`: the address that clients know it
        by, where that is another one.
        """
        self._place: Place
        if url.startswith("s3://"):
            self._place = Bucket(url, endpoint_url, public_endpoint_url)
        else:
            self._place = Folder(Path(url))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The storage that the settings name."""
        return cls(settings.artefacts_url, settings.s3_endpoint_url, settings.s3_public_endpoint_url)

    @contextmanager
    def open_write(self, key: str) -> Iterator[BinaryIO]:
        """Write one artefact; it appears when the block ends and not at all when the block raises."""
        path = _path(key)
        with self._answering(), self._place.write(path) as file:
            yield file

    @contextmanager
    def open_read(self, key: str) -> Iterator[BinaryIO]:
        """Read one artefact (seekable). FileNotFoundError if there is none."""
        path = _path(key)
        with self._answering(), self._place.read(path) as file:
            yield file

    def exists(self, key: str) -> bool:
        """Is there an artefact or folder of this key?"""
        path = _path(key)
        with self._answering():
            return self._place.exists(path)

    def path(self, key: str) -> Path:
        """Where the artefact lies on this machine's disk.

        ValueError when the storage is not a local folder.
        """
        if not isinstance(self._place, Folder):
            raise ValueError(f"{key} is not on a local disk. Use fetch.")
        return self._place.root / _path(key)

    def fetch(self, key: str, target: Path) -> None:
        """Have the artefact as the local file `target`, which is only ever read. FileNotFoundError if there is none.

        From a folder on the same disk nothing is copied.
        """
        path = _path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with self._answering():
            self._place.fetch(path, target)

    def put_folder(self, folder: Path, key: str) -> None:
        """Move the local `folder` to `key`. When that raises, `folder` is still there and may be put again.

        On one disk that is one rename. In an object store the files come one by one, manifest.json last: nobody may
        look for them before the row that names `key` is committed.
        """
        path = _path(key)
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        with self._answering():
            self._place.put_folder(folder, path)

    def delete(self, key: str) -> None:
        """Delete an artefact or folder; nothing happens if there is none."""
        path = _path(key)
        with self._answering():
            self._place.delete(path)

    def list(self, prefix: str) -> list[Stored]:
        """What lies directly under `prefix` ("files", "checkpoints"), and how old it is."""
        path = _path(prefix)
        with self._answering():
            return [Stored(f"{path}/{name}", age) for name, age in sorted(self._place.ages(path).items())]

    def sweep_drafts(self, age_seconds: float) -> int:
        """Delete what was begun so long ago and never got a name: its writer is dead. How many there were."""
        with self._answering():
            return self._place.sweep_drafts(age_seconds)

    def signed_url(self, key: str, seconds: int, headers: dict[str, str]) -> str | None:
        """An address that gives the artefact to whoever knows it, for so many seconds: never log it.

        `headers`: Content-Disposition, Content-Type and Cache-Control of its answer. None where the storage has no
        addresses: a local folder.
        """
        path = _path(key)
        with self._answering():
            return self._place.signed_url(path, seconds, headers)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Whatever the storage fails with becomes StorageAway."""
        try:
            yield
        except FileNotFoundError:
            raise
        except self._place.faults as error:
            log.warning("the storage of the artefacts failed: %s: %s", type(error).__name__, error)
            raise StorageAway(type(error).__name__) from error


def _path(key: str) -> str:
    """The key as a path below the root; ValueError for one that would leave the root or hide in it."""
    parts = PurePosixPath(key).parts
    if not parts or any(part.startswith((".", "/")) for part in parts) or "\\" in key or "\0" in key:
        raise ValueError(f"{key!r} is not an artefact key. Keys are relative paths without dots in front.")
    return "/".join(parts)
