"""Affinity of every family against loops over sequences, tokens and experts."""

from __future__ import annotations

import torch

from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, scores_by_hand, watched
from tests.scored import routing_statistics


@EVERY_FAMILY
@torch.no_grad()
def test_affinity_oracle(family: str) -> None:
    """Each sequence by itself and without padding; the mean over its tokens first, then over sequences."""
    model = tiny.build_model(family)
    view = moe_view(model)
    batches = [batch(seed=1), batch(rows=2, length=9, seed=2)]
    found = routing_statistics(view, batches).affinity
    seen = watched(view)
    wanted = torch.zeros(len(view.layers), view.num_experts, dtype=torch.float64)
    sequences = 0
    for given in batches:
        for row in range(len(given.input_ids)):
            real = int(given.attention_mask[row].sum())
            model(input_ids=given.input_ids[row : row + 1, :real], use_cache=False)
            sequences += 1
            for at, layer in enumerate(view.layers):
                told = seen[layer.index]
                scores = scores_by_hand(family, layer, told["states"])
                for token in range(real):
                    for expert in told["indices"][token].tolist():
                        wanted[at, expert] += float(scores[token, expert]) / real
    torch.testing.assert_close(found, wanted / sequences, rtol=1e-5, atol=1e-6)
    assert found.max() > found.min()
