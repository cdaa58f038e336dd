"""From a model in memory to the names and shapes of its tensors on disk.

transformers 5 fuses the experts of a layer while loading; on disk every expert has tensors of its own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from seuf_core.moe.view import MoEView, expert_parameters


def expert_tensors(view: MoEView, layer: int, experts: Iterable[int]) -> dict[str, torch.Tensor]:
    """Disk name -> tensor of the given experts, as the model holds them now (views, not copies).

    gate and up [I, H], down [H, I].
    """
    tensors = {}
    for expert in experts:
        names, rows = view.family.expert_names(layer, expert), expert_parameters(view.layer(layer), expert)
        tensors[names.gate], tensors[names.up] = rows["gate_up_proj"].chunk(2, dim=0)
        tensors[names.down] = rows["down_proj"]
    return tensors


def router_tensors(view: MoEView, layers: Iterable[int]) -> dict[str, torch.Tensor]:
    """Disk name -> router weight [E, H] of the given layers."""
    return {view.family.router_name(layer): view.layer(layer).router.weight.data for layer in layers}


def all_tensors(view: MoEView, on_disk: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Every parameter of the model under its disk name.

    Args:
        on_disk: the names in the files. A tied parameter (an output embedding that is the input embedding) is
            under each of its names that is there: transformers unties two tensors that differ. Without it,
            under its first name only.
    """
    tensors = router_tensors(view, view.layer_indices)
    inside = {id(layer.router.weight) for layer in view.layers}
    for layer in view.layers:
        tensors |= expert_tensors(view, layer.index, range(view.num_experts))
        inside |= {id(parameter) for parameter in layer.experts.parameters()}
    names: dict[int, list[str]] = {}
    others: dict[str, torch.Tensor] = {}
    for name, parameter in view.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in inside:
            names.setdefault(id(parameter), []).append(name)
            others[name] = parameter.data
    for aliases in names.values():
        kept = [name for name in aliases if on_disk is not None and name in on_disk] or aliases[:1]
        for name in set(aliases) - set(kept):
            del others[name]
    return others | tensors
