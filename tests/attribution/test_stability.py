"""Stability of a score between two halves, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from seuf_core.attribution.scores import Scored
from seuf_core.attribution.stability import Stability, stability
from tests.attribution.written import statistics_of

EMPTY = statistics_of([[[0, 1]]])


def scored(first: list[list[float]], second: list[list[float]]) -> Scored:
    halves = tuple(Scored(torch.tensor(half, dtype=torch.float64), EMPTY) for half in (first, second))
    return Scored(halves[0].matrix + halves[1].matrix, EMPTY, halves)


def best(half: Scored) -> list[tuple[int, int]]:
    """The single best expert of all layers, as its (row, expert)."""
    place = int(half.matrix.argmax())
    return [divmod(place, half.matrix.shape[1])]


def test_by_hand() -> None:
    """Layer 0: top-2 {0, 1} and {0, 3}, one of three; ranks (4, 3, 2, 1) and (4, 1, 2, 3): 1 - 6 * 8 / 60 = .2.

    Layer 1: the same experts in opposite order: top-2 {2, 3} and {0, 1}, rho -1. Both halves' best is (0, 0).
    """
    found = stability(
        scored([[0.9, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], [[0.8, 0.1, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]),
        2,
        best,
    )
    assert found.jaccard_top_k_by_layer == (pytest.approx(1 / 3), 0.0)
    assert found.rank_correlation_by_layer == (pytest.approx(0.2), pytest.approx(-1.0))
    assert found.jaccard_top_k == pytest.approx(1 / 6)
    assert found.rank_correlation == pytest.approx(-0.4)
    assert found.jaccard_selection == 1.0


def test_ties_share_their_mean_rank() -> None:
    """(4, 3, 2, 1) and (3.5, 3.5, 2, 1) give 4.5 / sqrt(5 * 4.5); (3, 1, 1, 1) and (1, 1, 1, 3) give -1/3."""
    tied = stability(scored([[0.4, 0.3, 0.2, 0.1]], [[0.5, 0.5, 0.2, 0.1]]), 2, best)
    assert tied.rank_correlation == pytest.approx(0.9**0.5)
    unchosen = stability(scored([[0.3, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.3]]), 1, best)
    assert unchosen.rank_correlation == pytest.approx(-1 / 3)


def test_equal_halves_agree_fully_and_opposite_ones_not_at_all() -> None:
    row = [0.4, 0.3, 0.2, 0.1]
    equal = stability(scored([row], [row]), 2, best)
    assert (equal.jaccard_top_k, equal.rank_correlation, equal.jaccard_selection) == (1, pytest.approx(1), 1)
    against = stability(scored([row], [row[::-1]]), 2, best)
    assert (against.jaccard_top_k, against.rank_correlation) == (0, pytest.approx(-1))
    assert against.jaccard_selection == 0


def test_the_selection_of_each_half_is_compared_by_the_rule_of_the_job() -> None:
    def two_best(half: Scored) -> list[tuple[int, int]]:
        return [(0, int(expert)) for expert in half.matrix[0].topk(2).indices]

    found = stability(scored([[0.4, 0.3, 0.2, 0.1]], [[0.4, 0.1, 0.3, 0.2]]), 3, two_best)
    assert found.jaccard_selection == pytest.approx(1 / 3)
    assert found.jaccard_top_k == pytest.approx(0.5)  # {0, 1, 2} and {0, 2, 3}: it is not the selection's


def test_constant_halves_share_no_order() -> None:
    found = stability(scored([[0.25] * 4], [[0.25] * 4]), 2, best)
    assert found.rank_correlation == 0.0
    assert stability(scored([[0.25] * 4], [[0.4, 0.3, 0.2, 0.1]]), 2, best).rank_correlation == 0.0


def test_an_expert_without_a_number_is_last() -> None:
    nan = float("nan")
    found = stability(scored([[nan, 0.3, 0.2, 0.1]], [[nan, 0.3, 0.2, 0.1]]), 2, lambda half: [(0, 1)])
    assert found.jaccard_top_k == 1.0
    mixed = stability(scored([[nan, 0.3, 0.2, 0.1]], [[0.4, 0.3, 0.2, 0.1]]), 2, lambda half: [(0, 1)])
    assert mixed.jaccard_top_k == pytest.approx(1 / 3)  # {1, 2} and {0, 1}
    assert mixed.rank_correlation == pytest.approx(-0.2)  # ranks (1, 4, 3, 2) and (4, 3, 2, 1)


def test_one_sequence_leaves_nothing_to_compare() -> None:
    found = stability(Scored(torch.rand(2, 4), EMPTY), 2, best)
    assert found == Stability(None, None, None, (), ())


def test_it_is_json() -> None:
    found = asdict(stability(scored([[0.4, 0.3, 0.2, 0.1]], [[0.4, 0.1, 0.2, 0.3]]), 2, best))
    assert json.loads(json.dumps(found)) == {
        "jaccard_top_k": pytest.approx(1 / 3),
        "rank_correlation": pytest.approx(0.2),
        "jaccard_selection": 1.0,
        "jaccard_top_k_by_layer": [pytest.approx(1 / 3)],
        "rank_correlation_by_layer": [pytest.approx(0.2)],
    }
