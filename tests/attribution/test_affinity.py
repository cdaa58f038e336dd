"""Affinity against a brute-force oracle of Eq. 2, its invariants, and selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seuf_core.attribution.affinity import (
    RoutingStatistics,
    contrast,
    random_scores,
    routing_statistics,
    stability,
)
from seuf_core.attribution.selection import (
    SelectedExpert,
    by_layer,
    coverage,
    random_in_same_layers,
    rank,
    select,
)
from seuf_core.data.batches import Encoded, collate, length_bucketed
from seuf_core.errors import MethodError
from seuf_core.moe.view import moe_view
from tests import tiny

LENGTHS = (3, 9, 5, 7, 12, 4)


def sequences(seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    return [Encoded(torch.randint(3, 259, (n,), generator=generator).tolist(), n - 2, False) for n in LENGTHS]


@torch.no_grad()
def oracle(family: str, rows: list[Encoded]) -> tuple[torch.Tensor, list[list[set[int]]]]:
    """Eq. 2 token by token: each sequence alone, no padding, the router's softmax by hand, plain loops."""
    model = tiny.build_model(family)
    view = moe_view(model)
    total = torch.zeros(len(view.layers), view.num_experts, dtype=torch.float64)
    answers: list[list[set[int]]] = []
    for row in rows:
        inputs: dict[int, torch.Tensor] = {}
        handles = [
            layer.router.register_forward_pre_hook(
                lambda _, args, i=i, inputs=inputs: inputs.__setitem__(i, args[0].reshape(-1, 32))
            )
            for i, layer in enumerate(view.layers)
        ]
        model(input_ids=torch.tensor([row.input_ids]))
        for handle in handles:
            handle.remove()
        chosen_at: list[list[set[int]]] = [[] for _ in row.input_ids]
        for i, layer in enumerate(view.layers):
            for t, state in enumerate(inputs[i]):
                logits = [float(state.double() @ w.double()) for w in layer.router.weight]
                s = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
                top = sorted(range(len(s)), key=lambda e: -float(s[e]))[: view.num_experts_per_tok]
                chosen_at[t].append(set(top))
                for e in top:
                    total[i, e] += float(s[e]) / len(row.input_ids) / len(rows)
        answers += [chosen_at[t] for t in range(row.labels_from - 1, len(row.input_ids) - 1)]
    return total, answers


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_affinity_equals_eq_2_token_by_token(family: str) -> None:
    rows = sequences()
    expected, answers = oracle(family, rows)
    view = moe_view(tiny.build_model(family))
    statistics = routing_statistics(view, length_bucketed(rows, tokens_per_batch=24, pad_token_id=0))
    torch.testing.assert_close(statistics.affinity, expected, rtol=1e-5, atol=1e-7)
    assert statistics.layers == view.layer_indices
    found = [[set(layer.tolist()) for layer in position] for position in statistics.answer_experts]
    assert sorted(map(str, found)) == sorted(map(str, answers))  # the order of sequences is the batches' own


def test_affinity_does_not_depend_on_batches_or_padding_token() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    rows = sequences()
    together = routing_statistics(view, [collate(rows, pad_token_id=0)]).affinity
    for pad in (0, 77):
        apart = routing_statistics(view, [collate([row], pad_token_id=pad) for row in rows]).affinity
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-7)
    other_padding = routing_statistics(view, [collate(rows, pad_token_id=200)]).affinity
    torch.testing.assert_close(other_padding, together, rtol=1e-6, atol=1e-8)


def test_every_layer_sums_to_the_gate_mass_of_the_chosen() -> None:
    view = moe_view(tiny.build_model("mixtral"))
    mass = routing_statistics(view, [collate(sequences(), 0)]).affinity.sum(dim=1)
    assert ((mass > 0.5) & (mass <= 1)).all()  # 2 of 4 experts hold at least half of a softmax


def test_contrast_is_antisymmetric_and_zero_on_equal_sets() -> None:
    view = moe_view(tiny.build_model("olmoe"))
    one = routing_statistics(view, [collate(sequences(0), 0)])
    two = routing_statistics(view, [collate(sequences(1), 0)])
    assert torch.equal(contrast(one, two), -contrast(two, one))
    assert not contrast(one, one).any()
    assert contrast(one, two).any()


def test_random_scores_depend_on_shape_and_seed_alone() -> None:
    assert torch.equal(random_scores(3, 8, 5), random_scores(3, 8, 5))
    assert not torch.equal(random_scores(3, 8, 5), random_scores(3, 8, 6))


def statistics_of(
    answer_experts: list[list[list[int]]], sums: torch.Tensor | None = None
) -> RoutingStatistics:
    layers = len(answer_experts[0])
    filled = torch.zeros(2, layers, 4) if sums is None else sums
    return RoutingStatistics(
        filled.double(),
        torch.tensor([1, 1]),
        torch.tensor(answer_experts, dtype=torch.int16),
        tuple(range(layers)),
    )


def test_stability_is_one_for_equal_halves_and_falls_when_they_disagree() -> None:
    same = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).expand(2, 1, 4)
    equal = stability(statistics_of([[[0, 1]]], same), 2)
    assert (equal.jaccard_top_k, equal.rank_correlation) == (1.0, pytest.approx(1.0))
    opposite = torch.stack([same[0], same[0].flip(-1)])
    against = stability(statistics_of([[[0, 1]]], opposite), 2)
    assert (against.jaccard_top_k, against.rank_correlation) == (0.0, pytest.approx(-1.0))


def test_experts_that_no_token_chose_do_not_agree() -> None:
    """Halves (.3, 0, 0, 0) and (0, 0, 0, .3): mean ranks (3, 1, 1, 1) and (1, 1, 1, 3), so rho = -1/3.

    Ranked by their index, the tied experts would make it positive or negative as the sort pleases.
    """
    sums = torch.tensor([[[0.3, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.3]]])
    assert stability(statistics_of([[[0, 1]]], sums), 1).rank_correlation == pytest.approx(-1 / 3)


def test_contrast_is_what_serves_forget_and_not_retain() -> None:
    """Affinities (.2, .1, 0, 0) and (.1, .3, 0, 0) by hand, two sequences each."""
    forget = statistics_of([[[0, 1]]], torch.tensor([[[0.4, 0.0, 0.0, 0.0]], [[0.0, 0.2, 0.0, 0.0]]]))
    retain = statistics_of([[[0, 1]]], torch.tensor([[[0.2, 0.3, 0.0, 0.0]], [[0.0, 0.3, 0.0, 0.0]]]))
    expected = torch.tensor([[0.1, -0.2, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(contrast(forget, retain), expected, rtol=1e-6, atol=1e-8)


def test_stability_by_hand() -> None:
    """Top-2 {0, 1} and {0, 3}: 1 of 3 experts. Ranks (4, 3, 2, 1) and (4, 1, 2, 3): rho = 1 - 6 * 8 / 60 = .2."""
    sums = torch.tensor([[[0.4, 0.3, 0.2, 0.1]], [[0.4, 0.1, 0.2, 0.3]]])
    found = stability(statistics_of([[[0, 1]]], sums), 2)
    assert (found.jaccard_top_k, found.rank_correlation) == (pytest.approx(1 / 3), pytest.approx(0.2))
    # Tied experts share their mean rank: (4, 3, 2, 1) and (3.5, 3.5, 2, 1) give 4.5 / sqrt(5 * 4.5).
    tied = torch.tensor([[[0.4, 0.3, 0.2, 0.1]], [[0.5, 0.5, 0.2, 0.1]]])
    assert stability(statistics_of([[[0, 1]]], tied), 2).rank_correlation == pytest.approx(0.9**0.5)


def test_stability_of_constant_halves_and_of_one_sequence_is_a_number() -> None:
    constant = torch.full((2, 1, 4), 0.25)
    assert stability(statistics_of([[[0, 1]]], constant), 2).rank_correlation == 0.0
    view = moe_view(tiny.build_model("olmoe"))
    one = stability(routing_statistics(view, [collate(sequences()[:1])]), 2)
    assert (one.jaccard_top_k, one.rank_correlation) == (0.0, 0.0)


def test_halves_are_the_even_and_the_odd_sequences() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    rows = sequences()
    whole = routing_statistics(view, [collate(rows[:3]), collate(rows[3:])])  # a batch of odd size in between
    assert whole.counts.tolist() == [3, 3]
    for half, start in zip(whole.half_affinities, (0, 1), strict=True):
        alone = routing_statistics(view, [collate(rows[start::2])]).affinity
        torch.testing.assert_close(half, alone, rtol=1e-5, atol=1e-7)


SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.8, 0.3, 0.7, 0.0]])


def pairs(targets: object) -> list[tuple[int, int]]:
    return [(t.layer, t.expert) for t in targets]  # type: ignore[attr-defined]


def test_ranking_by_spread() -> None:
    layers = (2, 5)
    assert pairs(rank(SCORES, layers, "one_per_layer"))[:4] == [(2, 1), (5, 0), (5, 2), (2, 2)]
    assert pairs(rank(SCORES, layers, "across_layers"))[:4] == [(2, 1), (5, 0), (5, 2), (5, 1)]
    assert pairs(rank(SCORES, layers, "same_layer")) == [(2, 1), (2, 2), (2, 0), (2, 3)]
    assert pairs(rank(SCORES.flip(0), layers, "same_layer"))[:2] == [(5, 1), (5, 2)]


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


def test_auto_takes_the_smallest_set_that_covers() -> None:
    statistics = statistics_of([[[1, 0], [0, 1]], [[2, 3], [0, 2]], [[2, 3], [1, 3]], [[1, 2], [1, 3]]])

    def chosen(min_coverage: float, most: int = 6) -> list[tuple[int, int]]:
        return pairs(
            select(
                SCORES,
                statistics,
                count=None,
                spread="one_per_layer",
                min_coverage=min_coverage,
                max_experts=most,
            )
        )

    assert chosen(0.5) == [(0, 1)]
    assert chosen(0.7) == [(0, 1), (1, 0)]
    assert chosen(1.0, most=2) == [(0, 1), (1, 0)]  # the bound cannot be met: as many as allowed


def test_more_experts_than_there_are_is_an_error() -> None:
    statistics = statistics_of([[[0, 1], [0, 1]]])
    with pytest.raises(MethodError) as caught:
        select(SCORES, statistics, count=5, spread="same_layer", min_coverage=1, max_experts=9)
    assert caught.value.code == "too_many_experts"
    assert caught.value.pointer == "/method/experts"


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


def test_by_layer_groups_and_sorts() -> None:
    assert by_layer(rank(SCORES, (2, 5), "across_layers")[:3]) == {2: (1,), 5: (0, 2)}
