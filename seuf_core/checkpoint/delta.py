"""Rebuild a written checkpoint from its base and its delta: a few megabytes stand for a model of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from seuf_core.checkpoint.copying import Share
from seuf_core.checkpoint.delta_file import read_delta
from seuf_core.checkpoint.index import CONFIG, read_index
from seuf_core.checkpoint.inspect import model_digest, read_config
from seuf_core.checkpoint.manifest import Manifest
from seuf_core.checkpoint.writer import Progress, plan, write_planned
from seuf_core.errors import WriteError


def apply_delta(
    base: Path, delta: Path, out: Path, progress: Progress | None = None, share: Share = "reflink"
) -> Manifest:
    """Write to `out` the checkpoint that `delta` came from: every file the same to the last byte.

    Every file is read and must have the sha256 that the delta promises, those shared with the base too.
    What the base has besides (a chat template added later) is left out.

    Args:
        base: folder of the model it was made from.
        delta: the delta.safetensors of the checkpoint.
        out: folder to create; it appears whole or not at all.
        progress, share: as for write_checkpoint.

    Raises:
        WriteError: not_a_delta, wrong_base, verification_failed (a file is not the one the delta promises), and
            as write_checkpoint does.
    """
    changed, facts = read_delta(delta)
    read_config(base)
    found = model_digest(read_index(base))
    if found != facts.base:
        raise _wrong_base(f"{delta} was made from {facts.base}, {base} is {found}.")
    planned = plan(base, changed)
    lost = sorted(facts.files.keys() - {*planned.files, CONFIG})
    if lost:
        raise _wrong_base(f"{base} has no {lost[0]}, which was there when {delta} was made.")
    files = tuple(name for name in planned.files if name in facts.files)
    return write_planned(replace(planned, files=files), out, facts, progress, share)


def _wrong_base(message: str) -> WriteError:
    return WriteError("wrong_base", message, "Give the base it was made from.")
