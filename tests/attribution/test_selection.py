"""Which experts a method chooses, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from seuf_core.attribution.scores import Scored
from seuf_core.attribution.selection import (
    SelectedExpert,
    by_layer,
    coverage,
    esft,
    first_choice,
    growth,
    random_in_same_layers,
    rank,
    select,
    selections,
)
from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.errors import MethodError
from seuf_core.method import Method, Spread
from tests.attribution.written import statistics_of

SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.8, 0.3, 0.7, 0.0]], dtype=torch.float64)
# Ten answer positions, one layer of four experts. Expert 0 sees 4 of them, 1 sees 3 others, 2 two others, 3 the last.
TEN = statistics_of([[[e, e]] for e in (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)])
DESCENDING = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
NAN = float("nan")


def pairs(targets: Iterable[SelectedExpert]) -> list[tuple[int, int]]:
    return [(target.layer, target.expert) for target in targets]


def test_ranking_by_spread() -> None:
    layers = (2, 5)
    assert pairs(rank(SCORES, layers, "one_per_layer"))[:4] == [(2, 1), (5, 0), (5, 2), (2, 2)]
    assert pairs(rank(SCORES, layers, "across_layers"))[:4] == [(2, 1), (5, 0), (5, 2), (5, 1)]
    assert pairs(rank(SCORES, layers, "same_layer")) == [(2, 1), (2, 2), (2, 0), (2, 3)]
    assert pairs(rank(SCORES.flip(0), layers, "same_layer"))[:2] == [(5, 1), (5, 2)]
    assert [target.score for target in rank(SCORES, layers, "across_layers")[:2]] == [0.9, 0.8]


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ("one_per_layer", [(2, 0), (5, 0), (2, 1), (5, 1)]),
        ("across_layers", [(2, 0), (2, 1), (5, 0), (5, 1)]),
        ("same_layer", [(2, 0), (2, 1)]),
    ],
)
def test_ties_go_to_the_lower_layer_and_expert(spread: Spread, expected: list[tuple[int, int]]) -> None:
    assert pairs(rank(torch.full((2, 2), 0.25), (2, 5), spread)) == expected


def test_an_expert_without_a_number_is_no_candidate() -> None:
    scores = torch.tensor([[NAN, 0.1, -0.2, NAN], [NAN, NAN, NAN, NAN]])
    for spread in ("one_per_layer", "across_layers", "same_layer"):
        assert pairs(rank(scores, (2, 5), spread)) == [(2, 1), (2, 2)]
    uneven = torch.tensor([[NAN, 0.1], [0.5, 0.4]])  # the best of layer 2 is its second expert
    assert pairs(rank(uneven, (2, 5), "one_per_layer")) == [(5, 0), (2, 1), (5, 1)]
    with pytest.raises(MethodError) as caught:
        rank(torch.full((2, 4), NAN), (2, 5), "across_layers")
    assert caught.value.code == "no_scores"


def test_a_given_number_is_the_top_of_the_ranking() -> None:
    def chosen(count: int, spread: Spread) -> list[tuple[int, int]]:
        return pairs(select(SCORES, (2, 5), count=count, spread=spread))

    assert chosen(1, "one_per_layer") == chosen(1, "across_layers") == chosen(1, "same_layer") == [(2, 1)]
    assert chosen(3, "across_layers") == [(2, 1), (5, 0), (5, 2)]
    assert chosen(3, "same_layer") == [(2, 1), (2, 2), (2, 0)]
    assert chosen(2, "one_per_layer") == [(2, 1), (5, 0)]


def test_more_experts_than_there_are_is_an_error() -> None:
    assert len(select(SCORES, (2, 5), count=4, spread="same_layer")) == 4
    with pytest.raises(MethodError) as caught:
        select(SCORES, (2, 5), count=5, spread="same_layer")
    assert caught.value.code == "too_many_experts"
    assert caught.value.pointer == "/method/experts"


def test_coverage_counts_positions_seen_by_any_target() -> None:
    statistics = statistics_of([[[1, 0], [0, 1]], [[2, 3], [0, 2]], [[2, 3], [1, 3]], [[1, 2], [1, 3]]])
    first, second = SelectedExpert(0, 1, 0.9), SelectedExpert(1, 0, 0.8)
    assert coverage(statistics, [first]) == 0.5
    assert coverage(statistics, [second]) == 0.5
    assert coverage(statistics, [first, second]) == 0.75
    assert coverage(statistics, []) == 0.0


def test_coverage_looks_at_every_choice_of_the_right_layer() -> None:
    """Decoder layers 1 and 4 are rows 0 and 1; an expert chosen second is chosen."""
    statistics = replace(statistics_of([[[1, 0], [2, 3]], [[0, 1], [3, 1]]]), layers=(1, 4))
    assert coverage(statistics, [SelectedExpert(1, 1, 0.9)]) == 1.0
    assert coverage(statistics, [SelectedExpert(4, 1, 0.9)]) == 0.5
    assert coverage(statistics, [SelectedExpert(4, 0, 0.9)]) == 0.0


def test_coverage_of_no_position_is_none() -> None:
    nothing = replace(TEN, answer_experts=TEN.answer_experts[:0])
    assert coverage(nothing, [SelectedExpert(0, 0, 0.9)]) == 0.0


def sizes(
    min_coverage: float, most: int = 4, statistics: RoutingStatistics = TEN, scores: torch.Tensor = DESCENDING
) -> list[int]:
    grown = growth(scores, statistics, spread="across_layers", min_coverage=min_coverage, max_experts=most)
    for selection in grown:
        assert pairs(selection) == pairs(grown[-1])[: len(selection)]  # each holds the one before
    return [len(selection) for selection in grown]


@pytest.mark.parametrize(
    ("min_coverage", "most", "expected"),
    [
        (0.4, 4, [1, 2, 3, 4]),
        (0.41, 4, [2, 3, 4]),
        (0.7, 4, [2, 3, 4]),
        (0.9, 4, [3, 4]),  # 9 of 10 is .9, though 1 - .9 is less than 1 / 10 in binary
        (1.0, 4, [4]),
        (1.0, 2, [2]),  # out of reach: as many as allowed
        (0.4, 1, [1]),
        (0.4, 2, [1, 2]),
        (0.1, 9, [1, 2, 3, 4]),  # no more than there are
    ],
)
def test_growth_by_hand(min_coverage: float, most: int, expected: list[int]) -> None:
    """One, two, three, four experts leave 6, 3, 1, 0 of the ten positions; each step leaves half or fewer."""
    assert sizes(min_coverage, most) == expected


def test_growth_skips_experts_that_do_not_halve_what_is_left() -> None:
    """Eight positions: expert 0 sees 4, 1 sees one other, 2 sees one other, 3 the last two: 4, 3, 2, 0 are left."""
    statistics = statistics_of([[[e, e]] for e in (0, 0, 0, 0, 1, 2, 3, 3)])
    assert sizes(0.5, statistics=statistics) == [1, 3, 4]
    assert sizes(0.5, 2, statistics=statistics) == [1, 2]  # cannot halve: as many as allowed, and the end


def test_growth_goes_on_by_doubling_when_everything_is_covered() -> None:
    everywhere = statistics_of([[[0, 3]], [[0, 1]]])
    assert sizes(0.75, 2, everywhere) == [1, 2]
    assert sizes(0.75, 3, everywhere) == [1, 2, 3]
    assert sizes(0.75, 4, everywhere) == [1, 2, 4]


def test_growth_follows_the_spread_and_counts_every_layer() -> None:
    """Position by position, experts of layer 0 / layer 1: 1,0 / 0,1; 2,3 / 0,2; 2,3 / 1,3; 1,2 / 1,3."""
    statistics = statistics_of([[[1, 0], [0, 1]], [[2, 3], [0, 2]], [[2, 3], [1, 3]], [[1, 2], [1, 3]]])
    grown = growth(SCORES, statistics, spread="one_per_layer", min_coverage=0.7, max_experts=3)
    assert [pairs(selection) for selection in grown] == [[(0, 1), (1, 0)], [(0, 1), (1, 0), (1, 2)]]


def test_growth_without_positions_is_the_longest_prefix() -> None:
    assert sizes(0.5, 3, replace(TEN, answer_experts=TEN.answer_experts[:0])) == [3]


SHARES = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("share", "first", "second"),
    [
        (0.2, [1], [0]),
        (0.25, [1], [0]),
        (0.26, [1], [0, 1]),
        (0.5, [1], [0, 1]),
        (0.51, [1, 3], [0, 1, 2]),
        (0.8, [1, 3], [0, 1, 2, 3]),  # .5 + .3 is not quite .8 in binary
        (0.81, [1, 3, 2], [0, 1, 2, 3]),
        (1.0, [1, 3, 2, 0], [0, 1, 2, 3]),
    ],
)
def test_esft_by_hand(share: float, first: list[int], second: list[int]) -> None:
    chosen = esft(SHARES, (1, 4), share)
    assert pairs(chosen) == [(1, e) for e in first] + [(4, e) for e in second]
    assert [target.score for target in chosen[: len(first)]] == [float(SHARES[0, e]) for e in first]


def test_esft_at_one_takes_every_expert_that_was_ever_chosen_and_no_other() -> None:
    """Thirds and sevenths do not sum to 1 in binary, and one place of 10 million is still a place."""
    thirds = torch.tensor([[1 / 3, 0.0, 1 / 3, 1 / 3], [1 - 1e-7, 0.0, 1e-7, 0.0]], dtype=torch.float64)
    assert pairs(esft(thirds, (0, 1), 1.0)) == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 2)]
    tenths = torch.tensor(
        [[0.1] * 10 + [0.0]], dtype=torch.float64
    )  # one after the other they sum to less than 1
    assert len(esft(tenths, (0,), 1.0)) == 10
    sevenths = torch.full((1, 7), 1 / 7, dtype=torch.float64)
    assert len(esft(sevenths, (0,), 1.0)) == 7
    assert [len(esft(sevenths, (0,), count / 7)) for count in range(1, 8)] == list(range(1, 8))


def test_random_experts_share_the_layers_and_never_the_experts() -> None:
    chosen = tuple(rank(SCORES, (2, 5), "across_layers")[:3])
    for seed in range(20):
        drawn = random_in_same_layers(chosen, SCORES, (2, 5), seed)
        assert [t.layer for t in drawn] == [t.layer for t in chosen]
        assert not set(pairs(drawn)) & set(pairs(chosen))
        assert len(set(pairs(drawn))) == 3
        assert [t.score for t in drawn] == [float(SCORES[{2: 0, 5: 1}[t.layer], t.expert]) for t in drawn]
    assert pairs(random_in_same_layers(chosen, SCORES, (2, 5), 3)) == pairs(
        random_in_same_layers(chosen, SCORES, (2, 5), 3)
    )
    drawn_by_seed = {tuple(pairs(random_in_same_layers(chosen, SCORES, (2, 5), seed))) for seed in range(20)}
    assert len(drawn_by_seed) > 3


def test_no_random_expert_is_left_where_all_are_chosen() -> None:
    chosen = tuple(rank(SCORES, (2, 5), "same_layer")[:3])
    with pytest.raises(MethodError) as caught:
        random_in_same_layers(chosen, SCORES, (2, 5), 0)
    assert caught.value.code == "no_random_expert"


def test_by_layer_groups_and_sorts() -> None:
    assert by_layer(rank(SCORES, (2, 5), "across_layers")[:3]) == {2: (1,), 5: (0, 2)}
    assert by_layer(SelectedExpert(5, expert, 0.0) for expert in (2, 0, 3)) == {5: (0, 2, 3)}


def chosen_by(
    scores: torch.Tensor, statistics: RoutingStatistics, **fields: Any
) -> list[list[tuple[int, int]]]:
    return [pairs(selection) for selection in selections(Scored(scores, statistics), Method(**fields))]


def test_a_method_with_a_number_has_one_selection() -> None:
    two_layers = replace(statistics_of([[[0, 1], [0, 1]]]), layers=(2, 5))
    assert chosen_by(SCORES, two_layers, experts=1) == [[(2, 1)]]
    assert chosen_by(SCORES, two_layers, experts=2, spread="same_layer") == [[(2, 1), (2, 2)]]
    assert chosen_by(SCORES, two_layers, experts=3, scope="top_m") == [[(2, 1), (5, 0), (5, 2)]]


def test_a_method_without_one_grows_within_its_fields() -> None:
    fields = {"coverage": 0.7, "max_experts": 3, "spread": "same_layer"}
    assert chosen_by(DESCENDING, TEN, **fields) == [[(0, 0), (0, 1)], [(0, 0), (0, 1), (0, 2)]]


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ("one_per_layer", [(2, 1), (5, 0)]),
        ("across_layers", [(2, 1), (5, 0)]),
        ("same_layer", [(2, 1), (2, 2)]),
    ],
)
def test_growth_lies_where_the_method_says(spread: Spread, expected: list[tuple[int, int]]) -> None:
    statistics = replace(statistics_of([[[1, 1], [3, 3]], [[2, 2], [0, 0]]]), layers=(2, 5))
    assert chosen_by(SCORES, statistics, spread=spread, coverage=1.0, max_experts=2) == [expected]


def test_esft_takes_its_share_of_every_layer() -> None:
    layers = replace(statistics_of([[[0, 1], [0, 1]]]), layers=(1, 4))
    assert chosen_by(SHARES, layers, scope="esft", esft_share=0.26) == [[(1, 1), (4, 0), (4, 1)]]


def test_half_of_the_experts_are_the_most_unless_a_number_is_given() -> None:
    fields = {"coverage": 0.4, "spread": "same_layer"}
    assert [len(chosen) for chosen in chosen_by(DESCENDING, TEN, **fields)] == [1, 2]
    assert [len(chosen) for chosen in chosen_by(DESCENDING, TEN, **fields, max_experts=3)] == [1, 2, 3]


def test_the_random_control_is_as_large_and_stops_growing_when_a_layer_is_half_chosen() -> None:
    """Of four experts one, two, three would be chosen; a control of three others is not there."""
    fields = {"coverage": 0.4, "spread": "same_layer", "seed": 3, "max_experts": 4}
    grown = chosen_by(DESCENDING, TEN, **fields)
    controls = chosen_by(DESCENDING, TEN, scope="random_expert", **fields)
    assert [len(selection) for selection in grown] == [1, 2, 3, 4]
    assert [len(control) for control in controls] == [1, 2]
    for selection, control in zip(grown, controls, strict=False):
        assert not set(selection) & set(control)
    with pytest.raises(MethodError) as caught:
        chosen_by(DESCENDING, TEN, scope="random_expert", experts=3)
    assert caught.value.code == "no_random_expert"


@pytest.mark.parametrize("seed", range(8))
def test_the_random_control_keeps_its_experts_while_it_grows(seed: int) -> None:
    """Six of twelve experts are chosen little by little, over two layers; so are six others beside them."""
    scores = torch.arange(24, dtype=torch.float64).flip(0).view(2, 12)
    covered = replace(statistics_of([[[0], [0]]]), layers=(2, 5))
    fields: dict[str, Any] = {"coverage": 0.5, "max_experts": 6, "seed": seed}
    grown = chosen_by(scores, covered, **fields)
    controls = chosen_by(scores, covered, scope="random_expert", **fields)
    assert [len(control) for control in controls] == [1, 2, 4, 6]
    for selection, control in zip(grown, controls, strict=True):
        assert control == controls[-1][: len(control)]
        assert [layer for layer, _ in control] == [layer for layer, _ in selection]
        assert not set(control) & set(grown[-1])


def test_the_first_choice_is_the_smallest_selection_and_that_of_the_control_what_it_controls() -> None:
    scored = Scored(DESCENDING, TEN)
    fields: dict[str, Any] = {"coverage": 0.7, "spread": "same_layer"}
    assert first_choice(scored, Method(**fields)) == [(0, 0), (0, 1)]
    assert first_choice(scored, Method(scope="random_expert", **fields)) == [(0, 0), (0, 1)]
    assert first_choice(scored, Method(scope="random_expert", experts=4, **fields)) == [
        (0, e) for e in range(4)
    ]
