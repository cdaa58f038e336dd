"""Routing statistics against numbers worked by hand, against brute force, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch

from seuf_core.attribution.statistics import RoutingStatistics
from seuf_core.data.batches import Encoded, collate, length_bucketed
from seuf_core.families import FAMILIES
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.attribution.written import routed
from tests.scored import routing_statistics
from tests.sequences import LENGTHS, sequences

# Sequence A has three tokens, B two and one of padding, which would show anywhere. The third token of A does not
# choose its second best expert, as routers with groups or a bias do.
SCORES = [
    [0.5, 0.3, 0.1, 0.1],
    [0.1, 0.6, 0.2, 0.1],
    [0.4, 0.1, 0.3, 0.2],
    [0.1, 0.1, 0.3, 0.5],
    [0.6, 0.2, 0.1, 0.1],
    [0.97, 0.01, 0.01, 0.01],
]
CHOSEN = [[0, 1], [1, 2], [0, 3], [3, 2], [0, 1], [0, 1]]


def by_hand(labels_from: tuple[int, int] = (1, 1)) -> RoutingStatistics:
    a, b = (Encoded(ids, start, False) for ids, start in zip(([5, 6, 7], [8, 9]), labels_from, strict=True))
    with routed(SCORES, CHOSEN) as view:
        return routing_statistics(view, [collate([a, b])])


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_affinity_by_hand() -> None:
    """A: ((.5 + .4) / 3, (.3 + .6) / 3, .2 / 3, .2 / 3); B: (.6, .2, .3, .5) / 2; then their mean.

    The five tokens in one mean would give (.3, .22, .1, .14).
    """
    close(by_hand().affinity, [0.3, 0.2, (0.2 / 3 + 0.15) / 2, (0.2 / 3 + 0.25) / 2])


def test_token_share_by_hand() -> None:
    """A fills six places: (2, 2, 1, 1) / 6; B four: (1, 1, 1, 1) / 4; then their mean."""
    close(by_hand().token_share, [7 / 24, 7 / 24, 5 / 24, 5 / 24])


def test_gate_full_by_hand() -> None:
    """A: (1, 1, .6, .4) / 3; B: (.7, .3, .4, .6) / 2; then their mean."""
    close(by_hand().gate_full, [(1 / 3 + 0.35) / 2, (1 / 3 + 0.15) / 2, 0.2, (0.4 / 3 + 0.3) / 2])


def test_prompts_count_in_the_scores_but_not_among_answers() -> None:
    """Labels from the third token of A, and from the second of B, are predicted at the token before."""
    early, late = by_hand((1, 1)), by_hand((2, 1))
    assert early.answer_experts.tolist() == [[[0, 1]], [[1, 2]], [[3, 2]]]
    assert late.answer_experts.tolist() == [[[1, 2]], [[3, 2]]]
    assert late.answer_experts.dtype == torch.int16
    for name in ("affinity", "token_share", "gate_full"):
        assert torch.equal(getattr(early, name), getattr(late, name))


@torch.no_grad()
def brute_force(
    family: str, rows: list[Encoded]
) -> tuple[dict[str, list[list[float]]], list[list[list[int]]]]:
    """The three scores token by token: each sequence alone, no padding, plain loops over plain numbers."""
    view = moe_view(tiny.build_model(family))
    shape = range(len(view.layers)), range(view.num_experts)
    names = ("affinity", "token_share", "gate_full")
    total = {name: [[0.0] * view.num_experts for _ in view.layers] for name in names}
    answers: list[list[list[int]]] = []
    for row in rows:
        with capture_routing(view) as routing:
            view.model(input_ids=torch.tensor([row.input_ids]))
        weight = 1 / len(row.input_ids) / len(rows)
        chosen_at: list[list[list[int]]] = [[] for _ in row.input_ids]
        for i, layer in zip(shape[0], view.layer_indices, strict=True):
            for t, logits in enumerate(routing.logits[layer].tolist()):
                if routing.score == "softmax":
                    s = [1 / sum(math.exp(other - logit) for other in logits) for logit in logits]
                else:
                    s = [1 / (1 + math.exp(-logit)) for logit in logits]
                chosen_at[t].append(sorted(routing.indices[layer][t].tolist()))
                for e in shape[1]:
                    selected = e in chosen_at[t][i]
                    total["affinity"][i][e] += weight * s[e] * selected
                    total["token_share"][i][e] += weight * selected / view.num_experts_per_tok
                    total["gate_full"][i][e] += weight * s[e]
        answers += chosen_at[row.labels_from - 1 : len(row.input_ids) - 1]
    return total, answers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_routing_score_equals_its_definition_token_by_token(family: str) -> None:
    rows = sequences()
    expected, answers = brute_force(family, rows)
    view = moe_view(tiny.build_model(family))
    found = routing_statistics(view, length_bucketed(rows, tokens_per_batch=24, pad_token_id=0))
    for name, matrix in expected.items():
        score = getattr(found, name)
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, torch.tensor(matrix, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert found.layers == view.layer_indices
    assert found.sequences == len(rows)
    positions = [[sorted(layer.tolist()) for layer in position] for position in found.answer_experts]
    assert sorted(positions) == sorted(answers)  # the order of sequences is the batches' own


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_invariants(family: str) -> None:
    """Rows of token_share sum to 1 (columns do not: ESFT's script has the axis wrong); affinity <= gate_full."""
    view = moe_view(tiny.build_model(family))
    with capture_routing(view) as routing:
        found = routing_statistics(view, [collate(sequences())])
    ones = torch.ones(len(view.layers), dtype=torch.float64)
    torch.testing.assert_close(found.token_share.sum(dim=1), ones, rtol=0, atol=1e-6)
    assert (found.token_share.sum(dim=0) - 1).abs().max() > 0.05
    assert (found.affinity <= found.gate_full + 1e-9).all()
    if routing.score == "softmax":
        torch.testing.assert_close(found.gate_full.sum(dim=1), ones, rtol=0, atol=1e-5)
        assert (found.affinity.sum(dim=1) <= 1 + 1e-6).all()


def test_every_layer_sums_to_the_gate_mass_of_the_chosen() -> None:
    view = moe_view(tiny.build_model("mixtral"))
    mass = routing_statistics(view, [collate(sequences())]).affinity.sum(dim=1)
    assert ((mass > 0.5) & (mass <= 1)).all()  # 2 of 4 experts hold at least half of a softmax


@pytest.mark.parametrize("name", ["affinity", "token_share", "gate_full"])
def test_batches_and_padding_change_nothing(name: str) -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    rows = sequences()
    together = getattr(routing_statistics(view, [collate(rows, pad_token_id=0)]), name)
    for pad in (0, 77):
        apart = routing_statistics(view, [collate([row], pad_token_id=pad) for row in rows])
        torch.testing.assert_close(getattr(apart, name), together, rtol=1e-5, atol=1e-7)
    other_padding = routing_statistics(view, [collate(rows, pad_token_id=200)])
    torch.testing.assert_close(getattr(other_padding, name), together, rtol=1e-6, atol=1e-8)


def test_two_sets_add_up_to_both() -> None:
    view = moe_view(tiny.build_model("olmoe"))
    rows = sequences()
    first, second = (routing_statistics(view, [collate(part)]) for part in (rows[:2], rows[2:]))
    both, added = routing_statistics(view, [collate(rows[:2]), collate(rows[2:])]), first + second
    assert added.sequences == both.sequences == len(LENGTHS)
    for name in ("affinity", "token_share", "gate_full"):
        torch.testing.assert_close(getattr(added, name), getattr(both, name), rtol=1e-12, atol=0)
    assert torch.equal(added.answer_experts, both.answer_experts)
    assert added.layers == both.layers


def test_no_sequence_gives_zeros_of_the_right_shape() -> None:
    view = moe_view(tiny.build_model("olmoe"))
    none = routing_statistics(view, [])
    assert none.sequences == 0
    assert none.affinity.shape == none.token_share.shape == none.gate_full.shape == (3, 8)
    assert not none.affinity.any()
    assert none.answer_experts.shape == (0, 3, 2)
