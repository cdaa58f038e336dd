"""Scope `lora`: low-rank adapters on every linear layer outside experts, routers and the output head.

LoRA, arXiv 2106.09685, as peft computes it: W x + (lora_alpha / r) B A x with A [r, in], B [out, r] and B = 0 at
the start. The base is frozen. peft wraps the layers themselves, not the model: inside `attached` the wrappers stand
in the model in the layers' places, outside they do not, so that every module and every name is the model's own.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from seuf_core.errors import ModelError
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.view import MoEView


class Adapted(NamedTuple):
    """One linear layer: where it hangs in the model, the layer, and peft's wrapper around it."""

    parent: nn.Module
    child: str
    layer: nn.Linear
    wrapper: Any


class LoraScope:
    """Adapters in fp32 on a frozen base of any dtype.

    Memory: 16 * r * (in + out) bytes a layer for adapters, gradients and AdamW state; from the first `merge` on
    also a copy of the adapted weights as the base has them.

    Args:
        view: the loaded model; sparse or dense.
        rank, alpha: the adapters are scaled by alpha / rank.
        seed: of A's initial values, drawn as nn.Linear draws them.
        on_disk: tensor names of the base's files, where they are known.

    Raises:
        ModelError: `shared_linear`, when a layer's weight is another parameter's too; `not_on_disk`, when a
            layer's weight has no tensor in the files. Nothing was changed then.
    """

    def __init__(
        self, view: MoEView, *, rank: int, alpha: float, seed: int, on_disk: Container[str] | None = None
    ) -> None:
        self._view, self._on_disk = view, on_disk
        layers = linear_layers(view)
        _refuse_what_cannot_be_written(view, layers, on_disk)
        view.model.requires_grad_(False)
        wrappers = _wrap(list(layers.values()), rank, alpha, seed)
        self._adapted: dict[str, Adapted] = {}
        for (name, layer), wrapper in zip(layers.items(), wrappers, strict=True):
            parent, _, child = name.rpartition(".")
            self._adapted[name] = Adapted(view.model.get_submodule(parent), child, layer, wrapper)
        self._base: dict[str, torch.Tensor] = {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`model.layers.0.self_attn.q_proj.lora_A` [r, in], then `.lora_B` [out, r], in the model's order."""
        named = {}
        for name, adapted in self._adapted.items():
            named[f"{name}.lora_A"], named[f"{name}.lora_B"] = _matrices(adapted.wrapper)
        return named

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block the wrappers stand in the places of their layers."""
        for adapted in self._adapted.values():
            setattr(adapted.parent, adapted.child, adapted.wrapper)
        try:
            yield
        finally:
            for adapted in self._adapted.values():
                setattr(adapted.parent, adapted.child, adapted.layer)

    def constrain(self) -> None:
        """Nothing to do: every value of an adapter is allowed."""

    @torch.no_grad()
    def merge(self) -> None:
        """Set every adapted weight to base + (alpha / r) B A, summed in fp32 and rounded once to its dtype.

        From the base each time, so that merging again adds nothing. Where the product is 0 the base stays bit for
        bit, its zeros with their signs.
        """
        if not self._base:
            self._base = {
                name: adapted.layer.weight.detach().clone() for name, adapted in self._adapted.items()
            }
        for name, adapted in self._adapted.items():
            base, delta = self._base[name], adapted.wrapper.get_delta_weight(_ADAPTER)
            adapted.layer.weight.copy_(torch.where(delta == 0, base, base + delta))

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        """The adapted weights under the names of the files."""
        memory = {_memory(adapted.layer.weight) for adapted in self._adapted.values()}
        tensors = all_tensors(self._view, self._on_disk)
        return {name: tensor for name, tensor in tensors.items() if _memory(tensor) in memory}


_ADAPTER = "default"  # peft's name for the only one


def linear_layers(view: MoEView) -> dict[str, nn.Linear]:
    """Every linear layer outside experts, routers and the output head: attention, dense MLPs, shared experts."""
    outside = {
        id(module)
        for layer in view.layers
        for part in (layer.router, layer.experts)
        for module in part.modules()
    }
    outside.add(id(view.model.get_output_embeddings()))
    return {
        name: module
        for name, module in view.model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in outside
    }


def _refuse_what_cannot_be_written(
    view: MoEView, layers: dict[str, nn.Linear], on_disk: Container[str] | None
) -> None:
    """A weight that is shared would change its other user too; one without a disk name would be lost."""
    users: dict[tuple[int, int], list[str]] = {}
    for name, parameter in view.model.named_parameters(remove_duplicate=False):
        users.setdefault(_memory(parameter), []).append(name)
    written = {
        _memory(tensor)
        for name, tensor in all_tensors(view, on_disk).items()
        if on_disk is None or name in on_disk
    }
    for name, layer in layers.items():
        shared = users[_memory(layer.weight)]
        if len(shared) > 1:
            raise ModelError(
                "shared_linear",
                f"{name} shares its weight with {next(other for other in shared if other != f'{name}.weight')}, "
                "so an adapter on the one would change the other.",
                "Use scope seuf or full.",
                "/method/scope",
            )
        if _memory(layer.weight) not in written:
            raise ModelError(
                "not_on_disk",
                f"The weight of {name} is not in the files as the model computes with it.",
                "Use scope seuf or full.",
                "/method/scope",
            )


def _wrap(layers: list[nn.Linear], rank: int, alpha: float, seed: int) -> list[Any]:
    """peft's wrapper around each layer, adapters in fp32, values a function of shapes and seed."""
    # Here, and not above: peft takes two seconds to import, and only this scope needs it.
    from peft import LoraConfig, inject_adapter_in_model

    # A list of the layers in place of the model: peft then neither renames modules in the model nor translates
    # target names for the fused experts of transformers 5, and leaves no attribute behind.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it by r
        target_modules=r"\d+",
        lora_dropout=0.0,
        bias="none",
    )
    holder = nn.ModuleList(layers)
    inject_adapter_in_model(config, holder, _ADAPTER)
    wrappers: list[Any] = list(holder)
    generator = torch.Generator().manual_seed(seed)
    for wrapper in wrappers:
        for matrix in _matrices(wrapper):
            matrix.data = matrix.data.float()  # peft took the base's dtype
        down = _matrices(wrapper)[0]
        bound = down.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), peft's and nn.Linear's own
        drawn = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
        down.data.copy_(drawn)
    return wrappers


def _matrices(wrapper: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r]."""
    return wrapper.lora_A[_ADAPTER].weight, wrapper.lora_B[_ADAPTER].weight


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the elements lie and how many: equal for a transposed view, not for a part of a fused tensor.

    Not the storage: tensors read from one file may share it.
    """
    return tensor.data_ptr(), tensor.numel()
