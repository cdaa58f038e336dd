"""Rebuild a written checkpoint from its base and its delta: a few megabytes stand for a model of any size."""

from __future__ import annotations

from pathlib import Path

from seuf_core.checkpoint.delta_file import read_delta
from seuf_core.checkpoint.inspect import model_digest
from seuf_core.checkpoint.manifest import Manifest
from seuf_core.checkpoint.writer import Progress, plan, write_planned
from seuf_core.errors import WriteError


def apply_delta(base: Path, delta: Path, out: Path, progress: Progress | None = None) -> Manifest:
    """Write to `out` the checkpoint that `delta` came from: every file the same to the last byte.

    Args:
        base: folder of the model it was made from.
        delta: the delta.safetensors of the checkpoint.
        out: folder to create; it appears whole or not at all.

    Raises:
        WriteError: not_a_delta, wrong_base, verification_failed (a patched shard is not the one the delta
            promises), and as write_checkpoint does.
    """
    changed, facts = read_delta(delta)
    planned = plan(base, changed)
    found = model_digest(planned.index)
    if found != facts.base:
        raise WriteError(
            "wrong_base",
            f"{delta} was made from {facts.base}, {base} is {found}.",
            "Give the base it was made from.",
        )
    return write_planned(planned, out, facts, progress)
