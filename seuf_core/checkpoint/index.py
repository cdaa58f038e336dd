"""Where every tensor of a checkpoint folder lies: shard, dtype, shape, byte range. Torch-free.

Reads safetensors headers by hand (8 bytes of little-endian length, then JSON; see the format's own page at
https://github.com/huggingface/safetensors#format), so that the service can look at a 90 GB model in
milliseconds without importing torch. Nothing here reads a weight.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seuf_core.errors import ModelError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The bound of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000

_ROW = re.compile(r"(?P<name>.+)\[(?P<index>0|[1-9][0-9]*)\]")

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor on disk.

    Attributes:
        shard: file name inside the folder.
        dtype: as safetensors writes it: "F32", "BF16", ...
        offset: of its first byte, counted from the start of the file.
        bytes: its length.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its name, size in bytes, and header as written (length prefix included)."""

    name: str
    size: int
    header: bytes


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """The tensors of a folder, by name, and its shards in name order."""

    folder: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorRecord]

    def record(self, name: str) -> TensorRecord | None:
        """Where a tensor lies, or None. `name[3]` is row 3 of its first axis: a tensor of its own inside another.

        So one expert of a fused tensor can be read, written and sent as a delta by itself.
        """
        row = _ROW.fullmatch(name)
        whole = self.tensors.get(row["name"] if row and name not in self.tensors else name)
        if row is None or whole is None or whole.name == name:
            return whole
        if not whole.shape or int(row["index"]) >= whole.shape[0]:
            return None
        size = whole.bytes // whole.shape[0]
        offset = whole.offset + int(row["index"]) * size
        return TensorRecord(name, whole.shard, whole.dtype, whole.shape[1:], offset, size)

    def with_prefix(self, prefix: str) -> list[TensorRecord]:
        """Records whose name starts with `prefix`, in file order."""
        found = (record for name, record in self.tensors.items() if name.startswith(prefix))
        return sorted(found, key=lambda record: (record.shard, record.offset))


def read_index(folder: Path) -> CheckpointIndex:
    """Read every shard header of a folder; a single model.safetensors wins over an index, as in transformers.

    Raises:
        ModelError: no_safetensors, incomplete_shards (missing or cut off), broken_shard, or ambiguous_tensor.
    """
    names = _shard_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "incomplete_shards",
            f"{len(missing)} of {len(names)} shards are missing from {folder}, the first is {missing[0]}.",
            "Download the model again.",
        )
    shards: list[Shard] = []
    tensors: dict[str, TensorRecord] = {}
    for name in sorted(names):
        shard, records = read_shard(folder, name)
        shards.append(shard)
        for record in records:
            # from_pretrained reads all tensors of all shards and the last one wins, whatever the index says.
            if record.name in tensors:
                raise ModelError(
                    "ambiguous_tensor",
                    f"Tensor {record.name} is in both {tensors[record.name].shard} and {name}.",
                    "Save the model again, so that each tensor is in one shard.",
                )
            tensors[record.name] = record
    _check_weight_map(folder, tensors)
    return CheckpointIndex(folder, tuple(shards), tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises ModelError(not_a_model)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _not_json(path) from error
    if not isinstance(value, dict):
        raise _not_json(path)
    return value


def _not_json(path: Path) -> ModelError:
    return ModelError("not_a_model", f"{path} is not a readable JSON object.", "Download the model again.")


def _weight_map(folder: Path) -> dict[str, str]:
    value = read_json(folder / INDEX).get("weight_map")
    if not isinstance(value, dict) or not value:
        raise _not_json(folder / INDEX)
    for shard in value.values():
        # A name with a path in it could point out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                "broken_shard", f"{INDEX} names the shard {shard!r}, which is not a .safetensors file name."
            )
    return value


def _shard_names(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return sorted(set(_weight_map(folder).values()))
    raise ModelError(
        "no_safetensors",
        f"{folder} has neither {SINGLE} nor {INDEX}.",
        "Save the model with save_pretrained, which writes safetensors; pickled weights are not opened.",
    )


def _check_weight_map(folder: Path, tensors: dict[str, TensorRecord]) -> None:
    if (folder / SINGLE).is_file():
        return
    lost = [name for name, shard in _weight_map(folder).items() if _shard_of(tensors, name) != shard]
    if lost:
        raise ModelError(
            "incomplete_shards",
            f"{len(lost)} tensors are not in the shard that {INDEX} names, the first is {lost[0]}.",
            "Download the model again.",
        )


def _shard_of(tensors: dict[str, TensorRecord], name: str) -> str | None:
    return tensors[name].shard if name in tensors else None


def read_shard(folder: Path, name: str) -> tuple[Shard, list[TensorRecord]]:
    """Header and tensors of one safetensors file. Raises ModelError(incomplete_shards, broken_shard)."""
    path = folder / name
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _broken(path, "its header is cut off")
        header = stream.read(length)
    try:
        entries = json.loads(header)
        records = [
            _record(name, key, entry, 8 + length) for key, entry in entries.items() if key != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, "its header is not a safetensors header") from error
    _check_layout(path, records, start=8 + length, size=size)
    return Shard(name, size, prefix + header), records


def _record(shard: str, name: str, entry: dict[str, Any], start: int) -> TensorRecord:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(name)
    if end - begin != math.prod(shape) * BITS[dtype] // 8:
        raise ValueError(name)
    return TensorRecord(name, shard, dtype, shape, start + begin, end - begin)


def _check_layout(path: Path, records: Iterable[TensorRecord], *, start: int, size: int) -> None:
    """Tensors must fill the file without hole or overlap: patching one can then touch no other."""
    at = start
    for record in sorted(records, key=lambda record: (record.offset, record.bytes)):
        if record.offset != at:
            raise _broken(path, f"tensor {record.name} overlaps another or leaves a hole")
        at += record.bytes
    if size < at:
        raise ModelError(
            "incomplete_shards",
            f"{path} has {size} bytes of {at}: it is cut off.",
            "Download the model again.",
        )
    if size > at:
        raise _broken(path, f"it has {size - at} bytes that belong to no tensor")


def _broken(path: Path, why: str) -> ModelError:
    return ModelError("broken_shard", f"{path} cannot be used: {why}.", "Download the model again.")
