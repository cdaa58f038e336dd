"""The weights that a job changed, as one digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.numpy import load_file

DELTA = "delta.safetensors"


def digest(checkpoint: Path) -> str:
    """sha256 over name, type, shape and bytes of every changed tensor of a checkpoint folder, in the order of names."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(checkpoint / DELTA).items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()
