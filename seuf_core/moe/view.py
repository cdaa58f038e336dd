"""One view of every MoE family that transformers has: its sparse layers, their routers and their experts.

The view holds references into a loaded model and copies nothing. It relies on two facts of transformers 5:
the class of a family's router is named in `_can_record_outputs["router_logits"]`, and its experts module keeps
fused `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], or both transposed, with `..._bias` [E, ...] or without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seuf_core import families
from seuf_core.errors import ModelError
from seuf_core.families import FAMILIES, Family, Score, family_of, has_experts
from seuf_core.moe.weights import Resident, Weights

# What a bias is called that the router adds to its scores to choose only; it lies in the router or its block.
_SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class MoELayer:
    """One sparse decoder layer: `index` counts all decoder layers, dense ones too.

    `router` and `experts` are modules of the family's own classes, whose attributes no type names.

    projection: the module inside the router, or the router itself, whose `weight` makes the logits.
    biased: the module that has a selection bias, and its name there; None in most families.
    """

    index: int
    router: Any
    experts: Any
    projection: Any
    biased: tuple[nn.Module, str] | None

    @property
    def selection_bias(self) -> torch.Tensor | None:
        """[E], added to the scores to choose the top K and not to weigh them; None in most families."""
        if self.biased is None:
            return None
        bias: torch.Tensor = getattr(*self.biased)
        return bias.data.view(-1)

    @property
    def router_weight(self) -> torch.Tensor:
        """[E, H]; inside `TargetExperts.attached` the value of its leaf."""
        weight: torch.Tensor = self.projection.weight
        return weight

    @property
    def router_bias(self) -> torch.Tensor | None:
        """[E], added to the logits; None in most families."""
        bias: torch.Tensor | None = getattr(self.projection, "bias", None)
        return bias


@dataclass(frozen=True)
class MoEView:
    """A loaded causal language model seen as layers of routers and experts.

    Shapes: L = len(layers) sparse layers, E = num_experts, K = num_experts_per_tok, H = hidden size.
    A dense model is a view without layers, and E = K = 0: what concerns the whole model works on it.

    weights: which decoder layers are in memory; all of them, unless the model was opened to be streamed.
    """

    model: PreTrainedModel
    family: Family
    layers: tuple[MoELayer, ...]
    num_experts: int
    num_experts_per_tok: int
    weights: Weights = field(default_factory=Resident)

    @cached_property
    def score(self) -> Score:
        """What the routers make of their logits before top-K."""
        return self.family.score_function(self.model.config.to_dict())

    @property
    def num_layers(self) -> int:
        """Decoder layers, sparse and dense."""
        return len(self.model.get_decoder().layers)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Decoder layer index of each row of an [L, E] score."""
        return tuple(layer.index for layer in self.layers)

    def layer(self, index: int) -> MoELayer:
        """The sparse layer with decoder index `index`.

        Raises:
            ModelError: `not_a_moe_layer`, when that layer has no experts.
        """
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise ModelError(
            "not_a_moe_layer",
            f"Layer {index} has no experts.",
            f"Choose one of {list(self.layer_indices)}.",
        )


def moe_view(model: PreTrainedModel, weights: Weights | None = None) -> MoEView:
    """Find routers and experts of a loaded model; a dense model has none.

    Raises:
        ModelError: `unknown_architecture` for a family of experts without a row.
    """
    weights = weights or Resident()
    model_type = model.config.model_type
    if model_type not in FAMILIES and not has_experts(model.config.to_dict()):
        return MoEView(model, Family(model_type, "dense"), (), 0, 0, weights)
    family = family_of(model_type)
    router_class = _router_class(model)
    layers = []
    for index, decoder_layer in enumerate(model.get_decoder().layers):
        for block in decoder_layer.modules():
            router = next((child for child in block.children() if isinstance(child, router_class)), None)
            if router is not None:
                layers.append(_layer(index, block, router))
                break
    if not layers:
        return MoEView(model, family, (), 0, 0, weights)
    first = layers[0].router
    return MoEView(model, family, tuple(layers), int(first.num_experts), int(first.top_k), weights)


def require_experts(view: MoEView) -> None:
    """Refuse a dense model. Raises ModelError(dense_model), as seuf_core.families.require_experts does."""
    families.require_experts(view.family.model_type, view.layer_indices)


def _layer(index: int, block: nn.Module, router: nn.Module) -> MoELayer:
    parts = list(router.modules())
    (projection,) = (part for part in parts if isinstance(getattr(part, "weight", None), nn.Parameter))
    places = ((part, name) for part in (block, *parts) for name in _SELECTION_BIAS)
    biased = next((place for place in places if getattr(*place, None) is not None), None)
    return MoELayer(index, router, block.get_submodule("experts"), projection, biased)


def _router_class(model: PreTrainedModel) -> type[nn.Module]:
    # The recorder lives on the family's PreTrainedModel class; model.model has it as well as the head model.
    recorded = getattr(model, "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits") or model.get_decoder()._can_record_outputs["router_logits"]
    recorder = recorder[0] if isinstance(recorder, (list, tuple)) else recorder
    target: type[nn.Module] = recorder.target_class
    return target


def expert_parameters(layer: MoELayer, expert: int) -> dict[str, torch.Tensor]:
    """Views (no copies) of one expert's rows of the fused tensors, as the family lays them out.

    gate_up_proj [2I, H] and down_proj [H, I]; in gpt_oss transposed, gate and up interleaved, and with
    gate_up_proj_bias [2I] and down_proj_bias [H].
    """
    return {name: parameter.data[expert] for name, parameter in layer.experts.named_parameters(recurse=False)}
