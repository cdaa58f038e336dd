"""The table of scores: each by hand, its invariant, its halves, and what `score_experts` reads for it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from seuf_core.attribution import scores
from seuf_core.attribution.gradient import Derivatives
from seuf_core.attribution.scores import SCORES, Measured, score_experts
from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.data.batches import collate
from seuf_core.method import Attribution, Method
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.scored import expert_derivatives, routing_statistics
from tests.sequences import sequences

NAMES = get_args(Attribution)


def statistics(gates: list[float], sequences: int = 1) -> RoutingStatistics:
    """One layer; places and scores are 2 and 3 times the gates, to tell them apart."""
    summed = torch.tensor([gates], dtype=torch.float64)
    return RoutingStatistics(summed, 2 * summed, 3 * summed, sequences, torch.zeros(1, 1, 1), (0,))


def measured(
    forget: RoutingStatistics,
    retain: RoutingStatistics | None = None,
    derivatives: Derivatives | None = None,
    seed: int = 0,
) -> Measured:
    return Measured(forget, retain, derivatives, seed)


def score(name: str, what: Measured) -> list[float]:
    matrix = SCORES[name].compute(what)  # type: ignore[index]
    assert matrix.dtype == torch.float64
    assert matrix.shape == what.forget.gates.shape
    return matrix[0].tolist()


def test_the_table_has_every_name_of_the_method() -> None:
    assert set(SCORES) == set(NAMES)


def test_the_routing_scores_are_means_over_sequences() -> None:
    what = measured(statistics([0.4, 0.2, 0.0, 1.0], sequences=2))
    assert score("affinity", what) == pytest.approx([0.2, 0.1, 0.0, 0.5])
    assert score("token_share", what) == pytest.approx([0.4, 0.2, 0.0, 1.0])
    assert score("gate_full", what) == pytest.approx([0.6, 0.3, 0.0, 1.5])


def test_contrast_is_what_serves_forget_and_not_retain() -> None:
    """Affinities (.2, .1, 0, 0) over two sequences and (.1, .3, 0, .2) over one."""
    forget, retain = statistics([0.4, 0.2, 0.0, 0.0], sequences=2), statistics([0.1, 0.3, 0.0, 0.2])
    assert score("contrast", measured(forget, retain)) == pytest.approx([0.1, -0.2, 0.0, -0.2])


def test_contrast_is_antisymmetric_and_zero_on_equal_sets() -> None:
    view = moe_view(tiny.build_model("olmoe"))
    one, two = (routing_statistics(view, [collate(sequences(seed))]) for seed in (0, 1))
    there, back, none = (scores.contrast(measured(a, b)) for a, b in ((one, two), (two, one), (one, one)))
    assert torch.equal(there, -back)
    assert there.any()
    assert not none.any()


def test_gradient_is_the_size_of_the_mean_derivative() -> None:
    """Over two sequences (-.4 and .1), (.2 and .2), (.5 and -.5): sums (-.3, .4, 0), halved, without sign.

    The mean of the sizes would be (.25, .2, .5) and choose the third, whose removal changes nothing on the whole.
    """
    first, second = (
        Derivatives(torch.tensor([row], dtype=torch.float64), 1)
        for row in ([-0.4, 0.2, 0.5], [0.1, 0.2, -0.5])
    )
    what = measured(statistics([0.0, 0.0, 0.0]), derivatives=first + second)
    assert score("gradient", what) == pytest.approx([0.15, 0.2, 0.0])


def test_random_scores_depend_on_shape_and_seed_alone() -> None:
    one = score("random", measured(statistics([0.4, 0.2, 0.0, 0.0]), seed=5))
    assert one == score("random", measured(statistics([0.0, 0.1, 0.7, 0.0], sequences=3), seed=5))
    assert one != score("random", measured(statistics([0.4, 0.2, 0.0, 0.0]), seed=6))
    assert all(0 <= value < 1 for value in one)
    assert len(set(one)) == 4


@pytest.mark.parametrize("name", ["contrast", "gradient"])
def test_a_score_without_what_it_reads_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        score(name, measured(statistics([0.4, 0.2, 0.0, 0.0])))


def directly(name: str, view: MoEView, forget_rows: list, retain_rows: list) -> torch.Tensor:  # type: ignore[type-arg]
    """The score of one set, from one pass over one batch."""
    forget, retain = (routing_statistics(view, [collate(rows)]) for rows in (forget_rows, retain_rows))
    expected = {
        "affinity": forget.affinity,
        "token_share": forget.token_share,
        "gate_full": forget.gate_full,
        "contrast": forget.affinity - retain.affinity,
        "gradient": expert_derivatives(view, [collate(forget_rows)]).mean.abs(),
        "random": torch.rand(3, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    }
    return expected[name]


@pytest.mark.parametrize("name", NAMES)
def test_score_experts_gives_the_score_and_that_of_the_even_and_odd_sequences(name: Attribution) -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    forget, retain = sequences(0), sequences(1, lengths=(4, 8, 6))
    found = score_experts(view, forget, retain, Method(attribution=name, seed=7))
    torch.testing.assert_close(found.matrix, directly(name, view, forget, retain), rtol=1e-4, atol=1e-7)
    assert (found.forget.sequences, found.forget.answer_experts.shape) == (6, (12, 3, 2))
    assert len(found.halves) == 2
    for start, half in enumerate(found.halves):
        expected = directly(name, view, forget[start::2], retain[start::2])
        torch.testing.assert_close(half.matrix, expected, rtol=1e-4, atol=1e-7)
        assert half.forget.answer_experts.shape == (6, 3, 2)
        assert half.halves == ()


@pytest.mark.parametrize(
    ("name", "total"), [("affinity", 6 * 3), ("random", 6 * 3), ("contrast", 9 * 3), ("gradient", 6 * 9)]
)
def test_progress_counts_every_layer_of_every_pass_and_ends_with_all(name: Attribution, total: int) -> None:
    view = moe_view(tiny.build_model("olmoe"))
    told: list[tuple[int, int]] = []
    retain = sequences(1, lengths=(4, 8, 6))
    score_experts(
        view, sequences(), retain, Method(attribution=name), lambda done, of: told.append((done, of))
    )
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {of for _, of in told} == {total}


def test_batches_stay_within_their_tokens() -> None:
    """A pass that keeps activations takes smaller batches; the scores do not depend on it."""
    view, rows, sizes = moe_view(tiny.build_model("olmoe")), sequences(), []
    whole = score_experts(view, rows, [], Method(attribution="gradient"))
    handle = view.layers[0].router.register_forward_pre_hook(
        lambda _, inputs: sizes.append((torch.is_grad_enabled(), inputs[0].flatten(0, -2).shape[0]))
    )
    found = score_experts(
        view, rows, [], Method(attribution="gradient"), tokens_per_batch=24, tokens_per_backward=12
    )
    handle.remove()
    assert max(tokens for _, tokens in sizes) in range(13, 25)
    assert max(tokens for backward, tokens in sizes if backward) in range(10, 13)
    torch.testing.assert_close(found.matrix, whole.matrix, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("forget", "retain"), [(1, 3), (2, 1)])
def test_a_set_of_one_sequence_has_no_halves(forget: int, retain: int) -> None:
    view = moe_view(tiny.build_model("olmoe"))
    forget_rows, retain_rows = sequences(0)[:forget], sequences(1)[:retain]
    found = score_experts(view, forget_rows, retain_rows, Method(attribution="contrast"))
    assert found.halves == ()
    expected = directly("contrast", view, forget_rows, retain_rows)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-7)


def test_a_score_that_does_not_read_retain_does_not_care_for_it() -> None:
    view = moe_view(tiny.build_model("olmoe"))
    found = score_experts(view, sequences(), [], Method(attribution="affinity"))
    assert len(found.halves) == 2
