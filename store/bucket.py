"""Artefacts in an object store that speaks S3.

It has no rename. A single file is sent in parts and appears under its name with the call that completes them. The
files of a folder appear one by one, so a folder may not be looked for before a row names it.

Credentials are those that every S3 program takes: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a file, or the
machine's role. They are no settings of ours, so they are in no list of settings and in no log.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

PART_BYTES: Final = 16 << 20
"""One part of a file that is sent: 10,000 of them are allowed, and s3fs takes larger ones where that is too few."""
PARTS_AT_ONCE: Final = 4
READ_BYTES: Final = 8 << 20
"""Read ahead per open file."""
TIMEOUTS: Final = {"connect_timeout": 5, "read_timeout": 60}
"""Seconds."""
TRIES: Final = 2
"""Of s3fs, each of up to two calls by botocore: a few seconds, then somebody else decides whether to wait."""
MANIFEST: Final = "manifest.json"


class Bucket:
    """The objects of one bucket below a prefix."""

    def __init__(self, url: str, endpoint_url: str, public_endpoint_url: str) -> None:
        """Sends nothing yet."""
        try:
            import s3fs  # a second's import, and an extra
        except ImportError as error:
            raise ValueError(f"{url} needs an S3 client. Install it: pip install 'seuf[s3]'") from error
        from aiohttp import ClientError as TransferError
        from botocore.exceptions import BotoCoreError, ClientError

        self.faults: tuple[type[Exception], ...] = (OSError, BotoCoreError, ClientError, TransferError)
        self._root = url.removeprefix("s3://").strip("/")
        self._bucket = self._root.partition("/")[0]
        # Another process may have changed what a listing said a moment ago, so none is kept.
        options = {
            "config_kwargs": {
                "signature_version": "s3v4",
                "retries": {"total_max_attempts": 2, "mode": "standard"},
                **TIMEOUTS,
            },
            "use_listings_cache": False,
            "skip_instance_cache": True,
        }
        self._fs: Any = s3fs.S3FileSystem(endpoint_url=endpoint_url or None, **options)
        self._fs.retries = TRIES
        self._signer: Any = self._fs
        if public_endpoint_url:
            self._signer = s3fs.S3FileSystem(endpoint_url=public_endpoint_url, **options)

    @contextmanager
    def write(self, path: str) -> Iterator[BinaryIO]:
        """See store.artefacts.Place."""
        with self._into_bucket():
            file = self._fs.open(self._full(path), "wb", block_size=PART_BYTES, autocommit=False)
        try:
            yield cast("BinaryIO", file)
            with self._into_bucket():
                file.close()
                file.commit()
        except BaseException:
            with suppress(*self.faults):  # else sweep_drafts does it
                file.discard()
            file.closed = True  # else it would send itself when it is collected
            raise

    def read(self, path: str) -> BinaryIO:
        """See store.artefacts.Place."""
        with self._out_of_bucket():
            return cast("BinaryIO", self._fs.open(self._full(path), "rb", block_size=READ_BYTES))

    def exists(self, path: str) -> bool:
        """See store.artefacts.Place."""
        return bool(self._fs.exists(self._full(path)))

    def put_folder(self, folder: Path, path: str) -> None:
        """See store.artefacts.Place. What arrived is counted before it counts as there."""
        root, sizes = self._full(path), {}
        for file in sorted(_files(folder), key=lambda file: file.name == MANIFEST):
            name = f"{root}/{file.relative_to(folder).as_posix()}"
            with self._into_bucket():
                self._fs.put_file(str(file), name, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            sizes[name] = file.stat().st_size
        found = {name: facts["size"] for name, facts in self._fs.find(root, detail=True).items()}
        if found != sizes:
            raise OSError(f"the store has {found} where {sizes} was sent")
        shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, path: str, target: Path) -> None:
        """See store.artefacts.Place."""
        with self.read(path) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, READ_BYTES)

    def delete(self, path: str) -> None:
        """See store.artefacts.Place."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    def ages(self, prefix: str) -> dict[str, float]:
        """See store.artefacts.Place."""
        now, ages = datetime.now(UTC), dict[str, float]()
        for path, facts in self._fs.find(self._full(prefix), detail=True).items():
            name = path.removeprefix(self._full(prefix) + "/").partition("/")[0]
            age = max(0.0, (now - facts["LastModified"]).total_seconds())
            ages[name] = min(age, ages.get(name, age))
        return ages

    def sweep_drafts(self, age_seconds: float) -> int:
        """See store.artefacts.Place. The parts of a file that nobody completed are paid for until then."""
        prefix = self._root.partition("/")[2]
        now, swept = datetime.now(UTC), 0
        for upload in self._fs.list_multipart_uploads(self._bucket):
            old = (now - upload["Initiated"]).total_seconds() >= age_seconds
            if old and upload["Key"].startswith(f"{prefix}/" if prefix else ""):
                self._fs.abort_mpu(self._bucket, upload["Key"], upload["UploadId"])
                swept += 1
        return swept

    def signed_url(self, path: str, seconds: int, headers: dict[str, str]) -> str:
        """See store.artefacts.Place."""
        named = {f"Response{name.replace('-', '')}": value for name, value in headers.items()}
        return str(self._signer.sign(self._full(path), expiration=seconds, **named))

    @contextmanager
    def _into_bucket(self) -> Iterator[None]:
        """Nothing that is written can be "not found" but the bucket itself."""
        try:
            yield
        except FileNotFoundError as error:
            raise OSError(f"the bucket {self._bucket} does not exist") from error

    @contextmanager
    def _out_of_bucket(self) -> Iterator[None]:
        """A file is gone only if its bucket is there: a wrong address must not read as lost data."""
        try:
            yield
        except FileNotFoundError:
            with self._into_bucket():
                self._fs.call_s3("head_bucket", Bucket=self._bucket)
            raise

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
