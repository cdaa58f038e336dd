"""Which experts are trained: from scores [L, E] to a short list of (layer, expert)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from seuf_core.attribution.affinity import RoutingStatistics
from seuf_core.errors import MethodError
from seuf_core.method import Spread


@dataclass(frozen=True)
class SelectedExpert:
    """One target: decoder layer index, expert index, and the score that chose it."""

    layer: int
    expert: int
    score: float


def rank(scores: torch.Tensor, layers: tuple[int, ...], spread: Spread) -> list[SelectedExpert]:
    """All candidates in the order in which they would be taken; ties go to the lower layer and expert.

    Args:
        scores: [L, E]; higher serves the forget set more.
        layers: decoder layer index of each row.
        spread: see `Method.spread`.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    candidates = [
        (place, SelectedExpert(layers[row], int(expert), float(scores[row, expert])))
        for row in range(len(layers))
        for place, expert in enumerate(order[row])
    ]
    best_layer = max(candidates, key=lambda c: c[1].score)[1].layer
    match spread:
        case "one_per_layer":
            candidates.sort(key=lambda c: (c[0], -c[1].score))
        case "across_layers":
            candidates.sort(key=lambda c: -c[1].score)
        case "same_layer":
            candidates = [c for c in candidates if c[1].layer == best_layer]
    return [candidate for _, candidate in candidates]


def coverage(statistics: RoutingStatistics, experts: Iterable[SelectedExpert]) -> float:
    """Share of answer positions at which at least one of `experts` was selected, in [0, 1]."""
    covered = torch.zeros(statistics.answer_experts.shape[0], dtype=torch.bool)
    for target in experts:
        row = statistics.layers.index(target.layer)
        covered |= (statistics.answer_experts[:, row] == target.expert).any(dim=-1)
    return float(covered.double().mean()) if covered.numel() else 0.0


def select(
    scores: torch.Tensor,
    statistics: RoutingStatistics,
    *,
    count: int | None,
    spread: Spread,
    min_coverage: float,
    max_experts: int,
) -> tuple[SelectedExpert, ...]:
    """The targets: `count` of them, or (None) the smallest prefix of the ranking that reaches `min_coverage`.

    Raises:
        MethodError: `too_many_experts` when `count` is more than there are candidates.
    """
    ranked = rank(scores, statistics.layers, spread)
    if count is not None:
        if count > len(ranked):
            raise MethodError(
                "too_many_experts",
                f"experts is {count}, but spread {spread} leaves {len(ranked)} candidates.",
                f"Ask for at most {len(ranked)}.",
                "/method/experts",
            )
        return tuple(ranked[:count])
    most = min(max_experts, len(ranked))
    for size in range(1, most + 1):
        if coverage(statistics, ranked[:size]) >= min_coverage:
            return tuple(ranked[:size])
    return tuple(ranked[:most])


def random_in_same_layers(
    chosen: tuple[SelectedExpert, ...], scores: torch.Tensor, layers: tuple[int, ...], seed: int
) -> tuple[SelectedExpert, ...]:
    """As many other experts of the same layers, drawn by seed: the control every selection is compared with."""
    generator = torch.Generator().manual_seed(seed)
    taken = {(target.layer, target.expert) for target in chosen}
    drawn: list[SelectedExpert] = []
    for target in chosen:
        row = layers.index(target.layer)
        free = [e for e in range(scores.shape[1]) if (target.layer, e) not in taken]
        if not free:
            raise MethodError(
                "no_random_expert",
                f"All experts of layer {target.layer} are chosen already, so no random one is left to compare with.",
                "Ask for fewer experts.",
                "/method/experts",
            )
        expert = free[int(torch.randint(len(free), (1,), generator=generator))]
        taken.add((target.layer, expert))
        drawn.append(SelectedExpert(target.layer, expert, float(scores[row, expert])))
    return tuple(drawn)


def by_layer(targets: Iterable[SelectedExpert]) -> dict[int, tuple[int, ...]]:
    """Decoder layer index -> its target experts, ascending: the form the MoE view wants."""
    grouped: dict[int, list[int]] = {}
    for target in targets:
        grouped.setdefault(target.layer, []).append(target.expert)
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(grouped.items())}
