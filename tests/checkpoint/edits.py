"""A change to a tiny model, once in memory and once by names on disk, and ways to compare folders."""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from seuf_core.families import DOWN_PROJ, GATE_UP_PROJ, ROUTER, family_of
from tests import tiny


def edited(family: str, layer: int, expert: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The tiny model of seed 0 with one expert and its router moved, and the same tensors by disk name."""
    model, generator = tiny.build_model(family), torch.Generator().manual_seed(7)
    state, names = model.state_dict(), family_of(family).expert_names(layer, expert)
    gate_up, down = (
        state[GATE_UP_PROJ.format(layer=layer)][expert],
        state[DOWN_PROJ.format(layer=layer)][expert],
    )
    router = state[ROUTER.format(layer=layer)]
    for tensor in (gate_up, down, router):
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    gate, up = gate_up.chunk(2)
    changed = {names.gate: gate, names.up: up, names.down: down, family_of(family).router_name(layer): router}
    return model, changed


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> sha256, for every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted."""
    return sorted(entry.name for entry in folder.iterdir())
