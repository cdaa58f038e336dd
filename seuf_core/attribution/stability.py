"""How far two disjoint halves of the data agree on the experts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch

from seuf_core.attribution.scores import Scored


@dataclass(frozen=True)
class Stability:
    """Agreement of two halves; every figure is null (and the lists empty) when a set has no second half.

    jaccard_top_k: mean over layers of |A & B| / |A | B| of the top-K experts of the halves, in [0, 1]
        (arXiv 2411.18797 found .87 between two subsets).
    rank_correlation: mean over layers of Spearman's rho, in [-1, 1], ties sharing their mean rank.
    jaccard_selection: the same of the experts that each half by itself would have selected.
    jaccard_top_k_by_layer, rank_correlation_by_layer: what the means are of, one a sparse layer.
    """

    jaccard_top_k: float | None = None
    rank_correlation: float | None = None
    jaccard_selection: float | None = None
    jaccard_top_k_by_layer: tuple[float, ...] = ()
    rank_correlation_by_layer: tuple[float, ...] = ()


def stability(
    scored: Scored, num_experts_per_tok: int, choose: Callable[[Scored], Iterable[tuple[int, int]]]
) -> Stability:
    """Compare the two halves of a score.

    Args:
        num_experts_per_tok: K, how many of a layer's experts are compared.
        choose: the job's rule of selection: scores -> (layer, expert) of each target.
    """
    if not scored.halves:
        return Stability()
    first, second = scored.halves
    # An expert without a number is last: nobody would choose it.
    matrices = [half.matrix.nan_to_num(nan=-torch.inf) for half in (first, second)]
    layers = list(zip(*matrices, strict=True))
    overlaps = tuple(_jaccard(_top(a, num_experts_per_tok), _top(b, num_experts_per_tok)) for a, b in layers)
    correlations = tuple(_spearman(a, b) for a, b in layers)
    return Stability(
        sum(overlaps) / len(overlaps),
        sum(correlations) / len(correlations),
        _jaccard(choose(first), choose(second)),
        overlaps,
        correlations,
    )


def _top(scores: torch.Tensor, count: int) -> list[int]:
    top: list[int] = torch.argsort(scores, descending=True, stable=True)[:count].tolist()
    return top


def _jaccard(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    a, b = set(first), set(second)
    return len(a & b) / len(a | b)


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
