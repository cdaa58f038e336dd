"""What every family's tests share: the list of rows, one padded batch, and a layer's tensors spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from seuf_core.data.batches import Batch
from seuf_core.families import FAMILIES
from seuf_core.moe.view import MoELayer, MoEView
from tests.moe.test_routing import random_batch

EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))

HIDDEN = 32


def batch(rows: int = 3, length: int = 7, seed: int = 0) -> Batch:
    """Random tokens; the second row is padded on the right; the first two tokens of each are prompt."""
    given = random_batch(rows, length, seed)
    return replace(given, input_ids=given.input_ids.masked_fill(given.attention_mask == 0, 0))


def logits_of(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """[B, S, V], with gradients where the caller wants them."""
    output = model(input_ids=given.input_ids, attention_mask=given.attention_mask, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


def loss_of(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Cross-entropy of the label tokens, by hand."""
    logits = logits_of(model, given)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.labels[:, 1:].flatten())


def watched(view: MoEView) -> dict[int, dict[str, torch.Tensor]]:
    """Filled by each forward pass: what each sparse layer's router read, and what its experts were told."""
    seen: dict[int, dict[str, torch.Tensor]] = {layer.index: {} for layer in view.layers}

    def watch(layer: MoELayer) -> None:
        def router(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[layer.index]["states"] = inputs[0].detach().reshape(-1, HIDDEN).clone()

        def experts(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[layer.index]["indices"], seen[layer.index]["weights"] = inputs[1].clone(), inputs[2].clone()

        layer.router.register_forward_pre_hook(router)
        layer.experts.register_forward_pre_hook(experts)

    for layer in view.layers:
        watch(layer)
    return seen


# By hand, beside the rows: what the model's paper or code calls the score of an expert.
SIGMOID = {
    "afmoe", "axk1", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe",
    "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "kimi_linear", "kolibri1", "lfm2_moe",
    "mimo_v2_flash", "minimax_m2", "solar_open",
}  # fmt: skip


def scores_by_hand(family: str, layer: MoELayer, states: torch.Tensor) -> torch.Tensor:
    """[T, E] from the router's own weights and what it read."""
    logits = states @ layer.projection.weight.detach().T
    if family == "gpt_oss":
        logits = logits + layer.projection.bias.detach()
    return logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
