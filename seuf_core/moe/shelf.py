"""Tensors that are computed once and read at every step: in memory, or past a limit in a file that is mapped."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch

# Bytes of the file that are mapped at once; where in it a tensor may begin.
SEGMENT: Final = 64 << 20
ALIGNMENT: Final = 64


class Shelf:
    """Keeps tensors by number. Memory: at most `limit` bytes; what does not fit goes to one file and is mapped.

    The file has no name from the start, so that it ends with the process however that ends.

    Args:
        folder: where that file may be, made when it is needed; the system's temporary folder when None.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._tensors: list[torch.Tensor] = []
        self._file: IO[bytes] | None = None
        self._segment = torch.empty(0, dtype=torch.uint8)
        self._used = self._reserved = 0
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
        """A copy in the file. One mapping serves many tensors: a process may have some 65,000 of them."""
        first = -(-self._used // ALIGNMENT) * ALIGNMENT
        if first + tensor.nbytes > len(self._segment):
            self._segment, first = self._longer(max(SEGMENT, tensor.nbytes)), 0
        self._used = first + tensor.nbytes
        self.bytes_on_disk += tensor.nbytes
        mapped = self._segment[first : self._used].view(tensor.dtype).view(tensor.shape)
        return mapped.copy_(tensor)

    def _longer(self, size: int) -> torch.Tensor:
        """That many more bytes of the file, [size] uint8."""
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the shelf
        file = self._file
        # A disk that is full is an error here, and not a signal when the page is written.
        os.posix_fallocate(file.fileno(), self._reserved, size)
        mapped = np.memmap(file, np.uint8, "r+", self._reserved, (size,))
        self._reserved += size
        return torch.from_numpy(mapped)
