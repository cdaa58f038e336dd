"""What a written checkpoint consists of: manifest.json, the last file written into it. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seuf_core.errors import WriteError

MANIFEST = "manifest.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """One file of the folder."""

    name: str = Field(description="File name inside the folder.")
    bytes: int = Field(ge=0, description="Size in bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Digest of the whole content, hex.")


class BaseRef(_Frozen):
    """The model this one was made from."""

    digest: str = Field(
        description="Content name of the base folder: seuf_core.checkpoint.inspect.model_digest."
    )
    model_type: str = Field(description="model_type of its config.json.")


class ChangedTensor(_Frozen):
    """One tensor that differs from the base."""

    tensor: str = Field(description="Name on disk.")
    shard: str = Field(description="File it lies in.")
    bytes: int = Field(ge=0, description="Size in bytes.")


class Manifest(_Frozen):
    """Every file of a checkpoint folder but this one, and how it differs from its base."""

    format: Literal[1] = 1
    created_by: str = Field(description="Program and version that wrote it.")
    base: BaseRef
    files: tuple[FileEntry, ...] = Field(description="Every other file, by name.")
    changed: tuple[ChangedTensor, ...] = Field(description="Tensors written anew; all others equal the base.")
    parameters_changed: int = Field(ge=0, description="Elements of the changed tensors.")
    parameters_total: int = Field(ge=0, description="Elements of all tensors.")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="What the caller adds: method, seed, metrics."
    )

    def to_json(self) -> str:
        """Stable text: two-space indent, fields in the order declared, newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        WriteError: no_manifest, or broken_manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise WriteError(
            "no_manifest", f"{folder} has no {MANIFEST}.", "Give a folder that was written to the end."
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise WriteError("broken_manifest", f"{path} is not a manifest: {error}.") from error


def verify_files(
    folder: Path, manifest: Manifest, progress: Callable[[int, int], None] | None = None
) -> None:
    """Check size and digest of every file of the manifest.

    Args:
        progress: called with (bytes read, bytes in all) before each file and at the end.

    Raises:
        WriteError: file_differs, naming the first file that is missing or differs.
    """
    read, total = 0, sum(entry.bytes for entry in manifest.files)
    for entry in manifest.files:
        if progress is not None:
            progress(read, total)
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            raise WriteError(
                "file_differs", f"{path} is not the file that {MANIFEST} describes.", "Download it again."
            )
        read += entry.bytes
    if progress is not None:
        progress(read, total)


def sha256_file(path: Path) -> str:
    """Digest of a file's content in hex, in pieces of 256 KiB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
