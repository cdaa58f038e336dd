"""Which experts are trained: from scores [L, E] to a short list of (layer, expert)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from seuf_core.attribution.scores import Scored
from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.errors import MethodError
from seuf_core.method import Method, Spread

Selection = tuple["SelectedExpert", ...]


@dataclass(frozen=True)
class SelectedExpert:
    """One target: decoder layer index, expert index, and the score that chose it."""

    layer: int
    expert: int
    score: float


def selections(scored: Scored, method: Method) -> tuple[Selection, ...]:
    """What a method may train: one selection, or with `experts: auto` several that grow, the smallest first.

    Raises:
        MethodError: `too_many_experts`, `no_scores`, see `select`; `no_random_expert`, see `random_in_same_layers`.
    """
    grown, layers = _best(scored, method), scored.forget.layers
    if method.scope != "random_expert":
        return grown
    # The control grows only while every layer has as many experts left as were chosen from it.
    free = [
        grown[0],
        *(chosen for chosen in grown[1:] if _most_in_a_layer(chosen) * 2 <= scored.matrix.shape[1]),
    ]
    # Drawn once, beside the largest: so the control too holds at each size what it held before.
    drawn = random_in_same_layers(free[-1], scored.matrix, layers, method.seed)
    return tuple(drawn[: len(chosen)] for chosen in free)


def first_choice(scored: Scored, method: Method) -> list[tuple[int, int]]:
    """(layer, expert) of the smallest selection; for the random control, of the experts it is the control of."""
    return [(target.layer, target.expert) for target in _best(scored, method)[0]]


def _best(scored: Scored, method: Method) -> tuple[Selection, ...]:
    scores, statistics = scored.matrix, scored.forget
    if method.scope == "esft":
        return (esft(scores, statistics.layers, method.esft_share),)
    if method.experts == "auto":
        return growth(
            scores,
            statistics,
            spread=method.spread,
            min_coverage=method.coverage,
            max_experts=max(1, scores.numel() // 2) if method.max_experts == "auto" else method.max_experts,
        )
    return (select(scores, statistics.layers, count=method.experts, spread=method.spread),)


def rank(scores: torch.Tensor, layers: tuple[int, ...], spread: Spread) -> list[SelectedExpert]:
    """All candidates in the order in which they would be taken; ties go to the lower layer and expert.

    Args:
        scores: [L, E]; higher serves the forget set more. An expert without a number is no candidate.
        layers: decoder layer index of each row.
        spread: see `Method.spread`.

    Raises:
        MethodError: `no_scores`, when no expert has a number.
    """
    order = torch.argsort(scores.nan_to_num(nan=-torch.inf), dim=1, descending=True, stable=True)
    candidates = [
        (place, SelectedExpert(layers[row], int(expert), float(scores[row, expert])))
        for row in range(len(layers))
        for place, expert in enumerate(order[row])
        if not math.isnan(scores[row, expert])
    ]
    if not candidates:
        raise MethodError(
            "no_scores",
            "The model's routers gave no number (NaN) for any expert.",
            "Check that the model answers at all, or load it in another dtype.",
            "/method/attribution",
        )
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
    positions = statistics.answer_experts.shape[0]
    left = _positions_left(statistics, experts)[-1]
    return (positions - left) / positions if positions else 0.0


def _positions_left(statistics: RoutingStatistics, experts: Iterable[SelectedExpert]) -> list[int]:
    """Answer positions that see none of the first 0, 1, 2, ... of `experts`."""
    covered = torch.zeros(statistics.answer_experts.shape[0], dtype=torch.bool)
    left = [covered.numel()]
    for target in experts:
        row = statistics.layers.index(target.layer)
        covered |= (statistics.answer_experts[:, row] == target.expert).any(dim=-1)
        left.append(covered.numel() - int(covered.sum()))
    return left


def select(scores: torch.Tensor, layers: tuple[int, ...], *, count: int, spread: Spread) -> Selection:
    """The first `count` of the ranking.

    Raises:
        MethodError: `too_many_experts` when `count` is more than there are candidates; `no_scores`, see `rank`.
    """
    ranked = rank(scores, layers, spread)
    if count > len(ranked):
        raise MethodError(
            "too_many_experts",
            f"experts is {count}, but spread {spread} leaves {len(ranked)} candidates.",
            f"Ask for at most {len(ranked)}.",
            "/method/experts",
        )
    return tuple(ranked[:count])


def growth(
    scores: torch.Tensor,
    statistics: RoutingStatistics,
    *,
    spread: Spread,
    min_coverage: float,
    max_experts: int,
) -> tuple[Selection, ...]:
    """Prefixes of the ranking, each longer than the one before: what `experts: auto` tries in turn.

    The first is the smallest that covers the share `min_coverage` of the answer positions. Each next one is the
    smallest that leaves at most half of the positions that the one before left, so that a job needs few of them; where
    nothing is left, it is twice as long. Where no allowed prefix does, it is the longest allowed, and the last.

    Args:
        scores: [L, E]; statistics: routing of the forget set; spread: see `Method.spread`.
        min_coverage: in (0, 1]; max_experts: length of the longest prefix, at least 1.
    """
    ranked = rank(scores, statistics.layers, spread)[:max_experts]
    left = _positions_left(statistics, ranked)
    most, positions = len(ranked), left[0]
    enough = (
        size for size in range(1, most) if positions and (positions - left[size]) / positions >= min_coverage
    )
    sizes = [next(enough, most)]
    while sizes[-1] < most:
        first = sizes[-1] + 1 if left[sizes[-1]] else 2 * sizes[-1]
        longer = range(first, most)
        sizes.append(next((size for size in longer if left[size] <= left[sizes[-1]] / 2), most))
    return tuple(tuple(ranked[:size]) for size in sizes)


def esft(token_share: torch.Tensor, layers: tuple[int, ...], share: float) -> Selection:
    """In every layer the smallest top set that holds at least `share` of the token places (arXiv 2407.01906).

    Ties go to the lower expert; at share = 1 it is every expert that was ever chosen, and no other.

    Args:
        token_share: [L, E], rows sum to 1; share: ESFT's p, in (0, 1].
    """
    # What may be left out is compared, not what is held: a sum of what is left is exactly 0 where nothing is,
    # while a sum to 1 is rounded. The margin is for shares that meet p, such as .5 + .3 and .8.
    allowed = (1 - share) * (1 + 1e-9)
    chosen: list[SelectedExpert] = []
    for layer, row in zip(layers, token_share, strict=True):
        order = torch.argsort(row, descending=True, stable=True)
        left_after = row[order].flip(0).cumsum(0).flip(0)[1:]  # [E - 1], share of those after the first, ...
        size = 1 + int((left_after > allowed).sum())
        chosen += [SelectedExpert(layer, int(expert), float(row[expert])) for expert in order[:size]]
    return tuple(chosen)


def random_in_same_layers(
    chosen: Selection, scores: torch.Tensor, layers: tuple[int, ...], seed: int
) -> Selection:
    """As many other experts of the same layers, drawn by seed: the control every selection is compared with.

    Raises:
        MethodError: `no_random_expert`, when a layer has none left.
    """
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


def _most_in_a_layer(chosen: Selection) -> int:
    return max(Counter(target.layer for target in chosen).values())


def by_layer(targets: Iterable[SelectedExpert]) -> dict[int, tuple[int, ...]]:
    """Decoder layer index -> its target experts, ascending: the form the MoE view wants."""
    grouped: dict[int, list[int]] = {}
    for target in targets:
        grouped.setdefault(target.layer, []).append(target.expert)
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(grouped.items())}
