"""A change to a tiny model, once in memory and once by names on disk, and ways to compare folders."""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from seuf_core.families import family_of
from tests import tiny


def edited(family: str, layer: int, expert: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The tiny model of seed 0 with one expert and its router moved, and the same tensors by disk name."""
    model, generator = tiny.build_model(family), torch.Generator().manual_seed(7)
    state, row = model.state_dict(), family_of(family)
    block = f"model.layers.{layer}.mlp"
    gate_up, down = (state[f"{block}.experts.{name}"][expert] for name in ("gate_up_proj", "down_proj"))
    router = state[f"{block}.gate.weight"]
    for tensor in (gate_up, down, router):
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    gate, up = gate_up.chunk(2)
    names = row.expert_names(layer, expert)
    values = [*zip(names["gate_up_proj"], (gate, up), strict=True), (names["down_proj"][0], down)]
    return model, {**dict(values), row.router_names(layer)["weight"]: router}


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> sha256, for every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted."""
    return sorted(entry.name for entry in folder.iterdir())
