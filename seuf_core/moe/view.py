"""One view of every MoE family that transformers has: its sparse layers, their routers and their experts.

The view holds references into a loaded model and copies nothing. It relies on two facts of transformers 5:
the class of a family's router is named in `_can_record_outputs["router_logits"]`, and its experts module keeps
fused `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seuf_core.errors import ModelError
from seuf_core.families import Family, family_of


@dataclass(frozen=True)
class MoELayer:
    """One sparse decoder layer: `index` counts all decoder layers, dense ones too.

    `router` and `experts` are modules of the family's own classes, whose attributes no type names.
    """

    index: int
    router: Any
    experts: Any


@dataclass(frozen=True)
class MoEView:
    """A loaded causal language model seen as layers of routers and experts.

    Shapes: L = len(layers) sparse layers, E = num_experts, K = num_experts_per_tok, H = hidden size.
    """

    model: PreTrainedModel
    family: Family
    layers: tuple[MoELayer, ...]
    num_experts: int
    num_experts_per_tok: int

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


def moe_view(model: PreTrainedModel) -> MoEView:
    """Find routers and experts of a loaded model.

    Raises:
        ModelError: `unknown_architecture` for a family without a row, `dense_model` when no layer has a router.
    """
    family = family_of(model.config.model_type)
    router_class = _router_class(model)
    layers = []
    for index, decoder_layer in enumerate(model.get_decoder().layers):
        for block in decoder_layer.modules():
            router = next((child for child in block.children() if isinstance(child, router_class)), None)
            if router is not None:
                layers.append(MoELayer(index, router, block.get_submodule("experts")))
                break
    if not layers:
        raise ModelError(
            "dense_model",
            f"No layer of this {family.model_type} model has experts.",
            "Use a model with experts.",
        )
    first = layers[0].router
    return MoEView(model, family, tuple(layers), int(first.num_experts), int(first.top_k))


def _router_class(model: PreTrainedModel) -> type[nn.Module]:
    # The recorder lives on the family's PreTrainedModel class; model.model has it as well as the head model.
    recorded = getattr(model, "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits") or model.get_decoder()._can_record_outputs["router_logits"]
    recorder = recorder[0] if isinstance(recorder, (list, tuple)) else recorder
    target: type[nn.Module] = recorder.target_class
    return target


def expert_parameters(layer: MoELayer, expert: int) -> dict[str, torch.Tensor]:
    """Views (no copies) of one expert's rows of the fused tensors: gate_up_proj [2I, H], down_proj [H, I]."""
    return {
        "gate_up_proj": layer.experts.gate_up_proj.data[expert],
        "down_proj": layer.experts.down_proj.data[expert],
    }
