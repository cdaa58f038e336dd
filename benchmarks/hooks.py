"""Attribution the ordinary way: the whole model in memory, hooks on its routers, batch after batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seuf_core.data.batches import Encoded, bucketed, collate
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import MoEView


@torch.no_grad()
def affinity(view: MoEView, rows: Sequence[Encoded], tokens_per_batch: int) -> torch.Tensor:
    """Eq. 2 of arXiv 2411.18797, fp64 [L, E]: mean over sequences of (mean over tokens of the gate)."""
    total = torch.zeros(len(view.layers), view.num_experts, dtype=torch.float64)
    with capture_routing(view) as routing:
        for bucket in bucketed(rows, lambda row: len(row.input_ids), tokens_per_batch):
            batch = collate(bucket).to(view.model.device)
            # No logits are needed: those of one position are the fewest that can be asked for.
            view.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                logits_to_keep=1,
            )
            mask = batch.attention_mask.double()
            weight = (mask / mask.sum(dim=1, keepdim=True)).view(-1)
            gates = (weight @ routing.gates(layer).double() for layer in view.layer_indices)
            total += torch.stack(list(gates)).cpu()
    return total / len(rows)
