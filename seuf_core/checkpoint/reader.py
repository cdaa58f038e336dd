"""Read some tensors of a checkpoint without loading the rest; the bytes of a tensor, to and from a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from seuf_core.checkpoint.index import CheckpointIndex, TensorRecord, read_index
from seuf_core.errors import ModelError
from seuf_core.families import LAYER_PREFIX

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

if sys.byteorder != "little":  # safetensors is little-endian, and bytes go straight into tensors here
    raise ImportError("seuf_core.checkpoint.reader needs a little-endian machine")


def read_tensor(file: int, record: TensorRecord) -> torch.Tensor:
    """One tensor of an open file, on the CPU, in its dtype on disk. Bound: its bytes, held once.

    Raises:
        ModelError: unknown_dtype, or incomplete_shards when the file ends inside the tensor.
    """
    if record.dtype not in TORCH_DTYPES:
        raise ModelError("unknown_dtype", f"Tensor {record.name} is {record.dtype}, which torch cannot hold.")
    tensor = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    _fill(file, record, tensor)
    return tensor


def _fill(file: int, record: TensorRecord, tensor: torch.Tensor) -> None:
    """Read straight into a contiguous CPU tensor of the record's dtype and size."""
    if record.bytes == 0:
        return
    buffer = tensor_bytes(tensor)
    done = 0
    while done < record.bytes:
        # One call reads at most 2 GiB on Linux.
        read = os.preadv(file, [buffer[done:]], record.offset + done)
        if read == 0:
            raise ModelError("incomplete_shards", f"{record.shard} ends inside tensor {record.name}.")
        done += read


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes: a view, not a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


class CheckpointReader:
    """Tensors of a folder by their names on disk, each read by itself at its offset.

    Bound: reading a set of tensors reads and holds exactly the sum of their bytes, once: no staging copy, and
    no mapping, which would count in resident memory for as long as a tensor lives and fault in whole pages
    under a limit. Files stay open until `close`: one descriptor a shard. Several threads may read at once.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers only. Raises ModelError as `read_index` does."""
        self.index: CheckpointIndex = read_index(folder)
        self._files: dict[str, int] = {}
        self._opening = Lock()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, or row `name[3]` of one, on the CPU, in its dtype on disk.

        Raises:
            ModelError: unknown_tensor, and as `read_tensor` does.
        """
        record = self._record(name)
        return read_tensor(self._file(record), record)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """One tensor into a contiguous CPU tensor of its shape, cast to that one's dtype.

        Bound: nothing beside `out` where the dtypes agree, else the tensor's bytes once.
        Raises as `tensor` does.
        """
        record = self._record(name)
        if TORCH_DTYPES.get(record.dtype) == out.dtype:
            _fill(self._file(record), record, out)
        else:
            out.copy_(read_tensor(self._file(record), record))

    def announce(self, names: Iterable[str]) -> None:
        """Let the system fetch these tensors into its page cache, where it can; returns at once."""
        for name in names if hasattr(os, "posix_fadvise") else ():
            record = self._record(name)
            os.posix_fadvise(self._file(record), record.offset, record.bytes, os.POSIX_FADV_WILLNEED)

    def _record(self, name: str) -> TensorRecord:
        record = self.index.record(name)
        if record is None:
            raise ModelError("unknown_tensor", f"{self.index.folder} has no tensor {name}.")
        return record

    def _file(self, record: TensorRecord) -> int:
        with self._opening:
            if record.shard not in self._files:
                self._files[record.shard] = os.open(self.index.folder / record.shard, os.O_RDONLY)
            return self._files[record.shard]

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors, by name. Bound: the sum of their bytes."""
        return {name: self.tensor(name) for name in names}

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Everything of one decoder layer, by name on disk, read in file order."""
        return self.tensors(
            record.name for record in self.index.with_prefix(LAYER_PREFIX.format(layer=layer))
        )

    def close(self) -> None:
        """Close the files; the reader can go on and opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
