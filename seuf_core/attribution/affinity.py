"""How much each expert serves a set of sequences: Eq. 2 of SEUF, and what is needed beside it.

Letters: L sparse layers, E experts, K experts per token, P answer positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from seuf_core.data.batches import Batch
from seuf_core.moe.routing import Routing, capture_routing
from seuf_core.moe.view import MoEView


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing of a data set, summed; nothing in it grows with the data but `answer_experts`.

    sums: [2, L, E] float64, per sequence mean over its real tokens of the gate g, summed over the sequences of
        each half (even and odd positions in the set); counts: [2] sequences of each half.
    answer_experts: [P, L, K] int16, the experts chosen where an answer token is predicted; 2 * P * L * K bytes.
    layers: decoder layer index of each row.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    answer_experts: torch.Tensor
    layers: tuple[int, ...]

    @property
    def affinity(self) -> torch.Tensor:
        """Eq. 2: mean over sequences of (mean over tokens of g), fp64 [L, E].

        Axis: each row is one layer. Invariant: a row sums to the mean mass of the selected experts, at most 1.
        """
        return self.sums.sum(dim=0) / self.counts.sum().clamp(min=1)

    @property
    def half_affinities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from each of two disjoint halves of the sequences."""
        first, second = self.sums / self.counts.clamp(min=1)[:, None, None]
        return first, second


@torch.no_grad()
def routing_statistics(
    view: MoEView, batches: Iterable[Batch], progress: Callable[[int], None] = lambda _: None
) -> RoutingStatistics:
    """Run the model over `batches` (padding on the right) and sum what its routers decide.

    Memory beyond the model: one batch's logits, [B * S, E] a layer, and the statistics themselves.
    """
    L, E = len(view.layers), view.num_experts
    sums, counts = torch.zeros(2, L, E, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    answers: list[torch.Tensor] = []
    seen = 0
    with capture_routing(view) as routing:
        for batch in batches:
            view.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            half = (seen + torch.arange(batch.input_ids.shape[0])) % 2
            sums.index_add_(0, half, _sequence_means(routing, view.layer_indices, batch))
            counts += torch.bincount(half, minlength=2)
            answers.append(_answer_experts(routing, view.layer_indices, batch))
            seen += batch.input_ids.shape[0]
            progress(seen)
    return RoutingStatistics(sums, counts, torch.cat(answers), view.layer_indices)


def _sequence_means(routing: Routing, layers: tuple[int, ...], batch: Batch) -> torch.Tensor:
    mask = batch.attention_mask.double()  # [B, S]; padding never counts
    per_layer = [routing.gates(layer).double().view(*mask.shape, -1) for layer in layers]
    gates = torch.stack(per_layer, dim=1)  # [B, L, S, E]
    summed = (gates * mask[:, None, :, None]).sum(dim=2)
    return (summed / mask.sum(dim=1).clamp(min=1)[:, None, None]).cpu()


def _answer_experts(routing: Routing, layers: tuple[int, ...], batch: Batch) -> torch.Tensor:
    predicts_answer = batch.predicts_label().view(-1)
    chosen = [routing.indices[layer][predicts_answer] for layer in layers]
    return torch.stack(chosen, dim=1).to(torch.int16).cpu()


def contrast(forget: RoutingStatistics, retain: RoutingStatistics) -> torch.Tensor:
    """Affinity on forget minus affinity on retain, fp64 [L, E]: who serves the one and not the other.

    Axis: experts of all layers compare. Invariant: antisymmetric in its arguments, 0 for equal sets.
    """
    return forget.affinity - retain.affinity


def random_scores(num_layers: int, num_experts: int, seed: int) -> torch.Tensor:
    """Seeded uniform scores, fp64 [L, E]. Invariant: a function of shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Stability:
    """How well two disjoint halves of the data agree on the experts (the paper found .87 between two subsets)."""

    jaccard_top_k: float  # mean over layers of |A & B| / |A | B| of the top-K experts of the halves
    rank_correlation: float  # mean over layers of Spearman's rho, ties sharing their mean rank


def stability(statistics: RoutingStatistics, num_experts_per_tok: int) -> Stability:
    """Compare the two halves of the statistics layer by layer; both 0 when one sequence leaves no second half."""
    if int(statistics.counts.min()) == 0:
        return Stability(0.0, 0.0)
    first, second = statistics.half_affinities
    jaccards, correlations = [], []
    for a, b in zip(first, second, strict=True):
        top_a, top_b = (set(x.topk(num_experts_per_tok).indices.tolist()) for x in (a, b))
        jaccards.append(len(top_a & top_b) / len(top_a | top_b))
        correlations.append(_spearman(a, b))
    return Stability(sum(jaccards) / len(jaccards), sum(correlations) / len(correlations))


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two [E] vectors; 0 when one of them is constant, as no order can be shared then."""
    ranks = torch.stack([_mean_ranks(a), _mean_ranks(b)])
    if bool((ranks == ranks[:, :1]).all(dim=1).any()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _mean_ranks(x: torch.Tensor) -> torch.Tensor:
    # Experts that no token chose all tie at 0: ranked by their index they would look like agreement.
    below, same = x[None, :] < x[:, None], x[None, :] == x[:, None]
    return below.double().sum(dim=1) + (same.double().sum(dim=1) - 1) / 2
