"""Router mode `project`: a router row learns only where the retain tokens of its expert do not see it.

GRIP, arXiv 2601.16905: with X_e [n_e, H] the router's inputs at the retain tokens that select expert e under the
model before training, `P_e = I - pinv(X_e) X_e` is the projection onto the null space of X_e, and X_e P_e d = 0
for every change d of row e: the logit of expert e does not change at those tokens.

P_e needs no pinv: with V_e [r_e, H] an orthonormal basis of the row space of X_e, P_e = I - V_e^T V_e. V_e are the
leading eigenvectors of the Gram matrix X_e^T X_e, which can be summed batch by batch. Only the weight is
projected. A router's bias stays as it is: every token sees it, so no change of it is unseen by retain tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from seuf_core.data.batches import PADDING, Batch, Encoded, length_bucketed
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.sweep import Progress, no_progress, sweep
from seuf_core.moe.view import MoEView

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Subspace:
    """The directions of one router row that retain tokens see, by the smaller of two orthonormal bases.

    basis: fp32 [k, H], rows orthonormal; of what is `held` (r_e rows) or of what is `free` (H - r_e rows).
    """

    basis: torch.Tensor
    spans: Literal["held", "free"]

    @property
    def everything_held(self) -> bool:
        """Whether the row cannot move at all."""
        return self.spans == "free" and self.basis.shape[0] == 0

    @property
    def nothing_held(self) -> bool:
        """Whether the row can move anywhere, as where no retain token selects the expert."""
        return self.spans == "held" and self.basis.shape[0] == 0

    def free_part(self, change: torch.Tensor) -> torch.Tensor:
        """P_e d for a change d [H] of the row."""
        inside = self.basis.T @ (self.basis @ change)
        return change - inside if self.spans == "held" else inside


def subspace(gram: torch.Tensor, energy: float) -> Subspace:
    """What one expert's retain inputs X_e span, from X_e^T X_e.

    Args:
        gram: fp64 [H, H].
        energy: the fewest leading directions are held that have this share of the squared singular values of
            X_e; 1 = all of them, up to numerical rank. What rounding adds in fp64 is not rank: a squared singular
            value counts from H * 2.2e-16 times the largest on, as torch.linalg.matrix_rank counts those of a
            symmetric matrix.
    """
    values, vectors = torch.linalg.eigh(gram)  # ascending; the eigenvectors are the columns
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    smallest = values[0] * gram.shape[0] * torch.finfo(gram.dtype).eps
    rank = int((values > smallest).sum())
    if energy < 1 and rank:
        shares = values.cumsum(0) / values.sum()
        rank = min(rank, int((shares < energy).sum()) + 1)
    held, free = vectors[:, :rank].T, vectors[:, rank:].T
    if held.shape[0] <= free.shape[0]:
        return Subspace(held.float().contiguous(), "held")
    return Subspace(free.float().contiguous(), "free")


@torch.no_grad()
def retain_grams(
    view: MoEView,
    layers: Collection[int],
    batches: Sequence[Batch],
    progress: Progress = no_progress,
    scratch: Path | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """X_e^T X_e of every expert of each layer under the model as it is: (layer, fp64 [E, H, H]), ascending.

    It is one tensor, which the next layer overwrites. Without a batch nothing comes.
    Only real tokens count. Nothing above the highest router is run. Memory: 8 * E * H^2 bytes, however many tokens
    there are, and that of `seuf_core.moe.sweep.sweep`. `progress` hears of every layer that a
    batch went through, in sequences times layers.
    """
    width = view.model.config.get_text_config().hidden_size
    grams = torch.zeros(view.num_experts, width, width, dtype=torch.float64, device=view.model.device)
    inputs: list[torch.Tensor] = []
    routers = [view.layer(layer).router for layer in layers]
    handles = [
        router.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for router in routers
    ]
    last, done = max(layers), 0
    total = (last + 1) * sum(len(batch.input_ids) for batch in batches)
    try:
        with capture_routing(view, tuple(layers)) as routing:
            for layer, number in sweep(view, batches, last, folder=scratch):
                batch = batches[number]
                if layer in layers:
                    if number == 0:
                        grams.zero_()
                    states = inputs.pop().reshape(-1, width)
                    real = batch.attention_mask.to(states.device).bool().view(-1, 1)
                    chosen = routing.selected(layer).bool() & real
                    for expert in range(view.num_experts):
                        rows = states[chosen[:, expert]].double()
                        grams[expert].addmm_(rows.T, rows)
                    if number == len(batches) - 1:
                        yield layer, grams
                done += len(batch.input_ids)
                progress(done, total)
    finally:
        for handle in handles:
            handle.remove()


class ProjectedRouter:
    """Keeps a router's weight where retain tokens do not see the change.

    Its gradient is projected, so that the optimiser never looks at a held direction. That is not enough: AdamW
    divides every element by a size of its own, which turns the step out of the subspace. So `constrain`, after
    each step, projects what has changed since the base as well. Memory beside the leaf: 4 * E * H bytes, and
    4 * H * min(r_e, H - r_e) summed over the experts.

    In a bf16 model the row is rounded to bf16 when it is used and when it is merged. That rounding is not
    projected, so that there retain tokens see a change of its size.

    Args:
        leaf: the fp32 router weight [E, H] that is trained, still as in the base.
        rows: what each row must not change in, E of them.
    """

    def __init__(self, leaf: nn.Parameter, rows: Sequence[Subspace]) -> None:
        self.rows = tuple(rows)
        self._leaf, self._base = leaf, leaf.detach().clone()
        leaf.register_hook(self.free_part)

    def free_part(self, change: torch.Tensor) -> torch.Tensor:
        """Row by row P_e d, of a gradient or a change [E, H]."""
        return torch.stack([row.free_part(d) for row, d in zip(self.rows, change, strict=True)])

    @torch.no_grad()
    def constrain(self) -> None:
        """base + P (leaf - base). A row that nothing holds is not touched, so that it is not rounded either."""
        allowed = self._base + self.free_part(self._leaf - self._base)
        for expert, row in enumerate(self.rows):
            if not row.nothing_held:
                self._leaf[expert] = allowed[expert]


def held_by_retain(
    view: MoEView,
    layers: Sequence[int],
    retain: Sequence[Encoded],
    energy: float,
    progress: Progress,
    scratch: Path | None = None,
) -> dict[int, tuple[Subspace, ...]]:
    """What the router rows of each layer must not change in, under the model as it is: layer -> E subspaces.

    Memory while it runs: that of `retain_grams`. Time: one pass over the retain set up to the highest of the layers,
    and E eigendecompositions of [H, H] a layer. `progress` and `scratch`: see there.
    """
    batches = list(length_bucketed(retain, TOKENS_PER_BATCH, PADDING))
    return {
        layer: tuple(subspace(gram, energy) for gram in grams)
        for layer, grams in retain_grams(view, layers, batches, progress, scratch)
    }
