"""Tensors that are computed once and read at every step: in memory, or past a limit in a file that is mapped."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch


class Shelf:
    """Keeps tensors by number. Memory: at most `limit` bytes; what does not fit goes to one file and is mapped.

    The file has no name from the start, so that it ends with the process however that ends.

    Args:
        folder: where that file may be; the system's temporary folder when None.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._tensors: list[torch.Tensor] = []
        self._file: IO[bytes] | None = None
        self.bytes_in_memory = self.bytes_on_disk = 0

    def put(self, tensor: torch.Tensor) -> int:
        """Keep a copy of a tensor, on the CPU; its number."""
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if self._limit is None or self.bytes_in_memory + tensor.nbytes <= self._limit:
            self.bytes_in_memory += tensor.nbytes
        elif tensor.nbytes:
            tensor = self._map(tensor)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def __getitem__(self, number: int) -> torch.Tensor:
        """The tensor itself, not a copy: writing into it writes what is kept."""
        return self._tensors[number]

    def _map(self, tensor: torch.Tensor) -> torch.Tensor:
        file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the shelf
        self._file = file
        offset = self.bytes_on_disk
        file.seek(offset)
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        self.bytes_on_disk += tensor.nbytes
        mapped = np.memmap(file, np.uint8, "r+", offset, (tensor.nbytes,))
        return torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)
