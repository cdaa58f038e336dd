"""Experts on a CPU in 16 bits: one matrix product an expert, of few different shapes.

oneDNN compiles a product for every shape it meets and keeps it, about .7 MB each. How many tokens go to an expert is
such a shape, so that a pass over experts compiles hundreds and, where few are kept, compiles them again in every
step. Here each expert's tokens are filled up to a multiple of ROWS. The rows that fill up are copies of the first
token, and are dropped.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

GROUPED_IMPLEMENTATION: Final = "seuf_grouped"
ROWS: Final = 16


def use_grouped(model: PreTrainedModel) -> None:
    """Let a model's experts be computed so where it pays: in bf16 or fp16 on the CPU."""
    if model.device.type == "cpu" and model.dtype.itemsize == 2:
        model.set_experts_implementation(GROUPED_IMPLEMENTATION)


def grouped_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function for transformers, equal to its `grouped_mm`.

    Args:
        self: the family's experts module. hidden_states: [T, H]; top_k_index: [T, K] int64; top_k_weights: [T, K].

    Returns:
        [T, H].
    """
    T, K = top_k_index.shape
    if not T:
        return hidden_states
    expert, order = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert, minlength=len(self.down_proj))
    filled = (counts + ROWS - 1) // ROWS * ROWS
    # Where the i-th of the sorted pairs lies: its expert's first row, and its place among that expert's.
    rank = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert]
    place = torch.empty_like(order).index_copy_(0, order, (filled.cumsum(0) - filled)[expert] + rank)
    source = place.new_zeros(int(filled.sum())).index_copy_(
        0, place, torch.arange(T * K, device=place.device) // K
    )
    states: torch.Tensor = _Spread.apply(hidden_states, source, place)  # type: ignore[no-untyped-call]
    said = [
        _expert(self, number, some) for number, some in enumerate(states.split(filled.tolist())) if len(some)
    ]
    del states  # with `said`, as large as all that follows
    together = torch.cat(said)
    del said
    each: torch.Tensor = _Collect.apply(together, place)  # type: ignore[no-untyped-call]
    del together
    weighted = each.view(T, K, -1) * top_k_weights[:, :, None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _expert(module: Any, number: int, states: torch.Tensor) -> torch.Tensor:
    gate_up = _project(module, "gate_up_proj", number, states)
    return _project(module, "down_proj", number, module._apply_gate(gate_up))


def _project(module: Any, name: str, number: int, states: torch.Tensor) -> torch.Tensor:
    weight, biases = getattr(module, name)[number], getattr(module, f"{name}_bias", None)
    bias = None if biases is None else biases[number]
    return nn.functional.linear(states, weight.T if module.is_transposed else weight, bias)


class _Spread(torch.autograd.Function):
    """states[source]; every token is in it K times, at `place` [T * K]: its gradient is a sum, not a scatter."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, source: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = len(states)
        return states.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place).view(ctx.tokens, -1, gradient.shape[1]).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """said[place]; no row is there twice."""

    @staticmethod
    def forward(ctx: Any, said: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(said)
        return said.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (place,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, place, gradient), None


ALL_EXPERTS_FUNCTIONS.register(GROUPED_IMPLEMENTATION, grouped_experts_forward)
