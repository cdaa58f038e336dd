"""From a model in memory to the names and shapes of its tensors on disk.

transformers 5 fuses the experts of a layer while loading and renames what it likes to call otherwise; on disk
every expert has tensors of its own, or a row of a fused one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from transformers.core_model_loading import revert_weight_conversion

from seuf_core.checkpoint.index import CheckpointIndex
from seuf_core.checkpoint.reader import TORCH_DTYPES
from seuf_core.moe.view import MoEView, expert_parameters


def expert_tensors(view: MoEView, layer: int, experts: Iterable[int]) -> dict[str, torch.Tensor]:
    """Disk name -> tensor of the given experts, as the model holds them now (views, not copies).

    gate and up [I, H], down [H, I]; or, named `name[expert]`, rows of the fused tensors in the model's own layout.
    """
    tensors: dict[str, torch.Tensor] = {}
    for expert in experts:
        names = view.family.expert_names(layer, expert)
        for name, rows in expert_parameters(view.layer(layer), expert).items():
            tensors |= zip(names[name], rows.chunk(len(names[name]), dim=0), strict=True)
    return tensors


def router_tensors(view: MoEView, layers: Iterable[int]) -> dict[str, torch.Tensor]:
    """Disk name -> router weight [E, H] and, where there is one, bias [E] of the given layers."""
    tensors = {}
    for index in layers:
        projection = view.layer(index).projection
        for name, disk in view.family.router_names(index).items():
            tensors[disk] = getattr(projection, name).data
    return tensors


def all_tensors(view: MoEView, on_disk: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Every parameter of the model under its disk name: views, not copies. Buffers, which no training moves, are
    not in it.

    Names that transformers changed while loading are changed back by its own reversal of what it did.

    Args:
        on_disk: the names in the files. A tied parameter (an output embedding that is the input embedding) is
            under each of its names that is there: transformers unties two tensors that differ. Without it,
            under its first name only.
    """
    experts: dict[str, torch.Tensor] = {}
    split: set[int] = set()  # what is cut into experts here, because transformers' own reversal copies it
    if not view.family.fused:
        for layer in view.layers:
            experts |= expert_tensors(view, layer.index, range(view.num_experts))
            split |= {id(parameter) for parameter in layer.experts.parameters()}
    memory: dict[str, torch.Tensor] = {}
    aliases: dict[int, list[str]] = {}
    for name, parameter in view.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in split:
            memory[name] = parameter.data
            aliases.setdefault(id(parameter), []).append(name)
    others = _disk_names(view, memory)
    for tied in (names for names in aliases.values() if len(names) > 1):
        on = [next(iter(_disk_names(view, {name: memory[name]}))) for name in tied]
        kept = [name for name in on if on_disk is not None and name in on_disk] or on[:1]
        for name in set(on) - set(kept):
            del others[name]
    return others | experts


@torch.no_grad()
def round_to_disk(tensors: Mapping[str, torch.Tensor], index: CheckpointIndex) -> None:
    """Round the model's own tensors, given by disk name, to the dtypes that the files have, in place.

    Some families keep their routers in fp32 in memory and the files may have them in 16 bits (Hunyuan, ERNIE,
    Flint, Beam): what is measured must be what will be read back.
    """
    for name, tensor in tensors.items():
        record = index.record(name)
        if record is not None:
            tensor.copy_(tensor.to(TORCH_DTYPES[record.dtype]))


def _disk_names(view: MoEView, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(view.model, tensors)
    return reverted
