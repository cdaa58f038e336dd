"""A real tiny model whose routers decide what a test writes down, and statistics written without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny


@contextmanager
def routed(scores: list[list[float]], chosen: list[list[int]]) -> Iterator[MoEView]:
    """A one-layer OLMoE whose router says `scores` [T, E] (a softmax) and chooses `chosen` [T, K] for any input."""
    view = moe_view(
        tiny.build_model(
            "olmoe", num_hidden_layers=1, num_experts=len(scores[0]), num_experts_per_tok=len(chosen[0])
        )
    )
    logits, indices = torch.tensor(scores).log(), torch.tensor(chosen)
    weights = torch.full(indices.shape, 0.5)
    handle = view.layers[0].router.register_forward_hook(lambda *_: (logits, weights, indices))
    try:
        yield view
    finally:
        handle.remove()


def statistics_of(
    answer_experts: list[list[list[int]]], gates: torch.Tensor | None = None
) -> RoutingStatistics:
    """Statistics of one sequence, four experts: `answer_experts` [P, L, K], and `gates` [L, 4] (0 if not given)."""
    layers = len(answer_experts[0])
    zeros = torch.zeros(layers, 4, dtype=torch.float64)
    return RoutingStatistics(
        zeros if gates is None else gates.double(),
        zeros,
        zeros,
        1,
        torch.tensor(answer_experts, dtype=torch.int16),
        tuple(range(layers)),
    )
