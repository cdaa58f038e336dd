"""Every loss against numbers worked by hand, and the things that must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from seuf_core.data.batches import collate
from seuf_core.moe.forward import answer_logits, layer_states
from seuf_core.unlearning import losses
from tests import tiny
from tests.attribution.test_affinity import sequences

# Two examples over a vocabulary of 2. Logits (0, ln 3) give p = (1/4, 3/4); (0, 0) give (1/2, 1/2).
LOGITS = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0]])
TARGET = torch.tensor([1, 0, 0])
ROW = torch.tensor([0, 0, 1])
# Example 0 has labels with p = 3/4 and 1/4: l = ln(16/3). Example 1 has one label with p = 1/2: l = ln 2.
L0, L1 = math.log(16 / 3), math.log(2)
NLL, TOKENS = torch.tensor([L0, L1]), torch.tensor([2, 1])


def test_sequence_nll_sums_over_labels() -> None:
    nll, tokens = losses.sequence_nll(LOGITS, TARGET, ROW, 2)
    torch.testing.assert_close(nll, NLL)
    assert tokens.tolist() == [2, 1]


def test_cross_entropy_is_the_mean_over_tokens() -> None:
    """(l_0 + l_1) / 3 tokens."""
    torch.testing.assert_close(losses.cross_entropy(NLL, TOKENS), torch.tensor((L0 + L1) / 3))


def test_gradient_ascent_is_minus_the_mean_of_lbar() -> None:
    """-(l_0 / 2 + l_1 / 1) / 2: per example first, so a long answer weighs no more than a short one."""
    torch.testing.assert_close(losses.gradient_ascent(NLL, TOKENS), torch.tensor(-(L0 / 2 + L1) / 2))


def test_npo_by_hand() -> None:
    """b = .5, l = (4, 2), l_ref = (2, 2): -(2/.5) ln sigmoid(.5 * 2) and -(2/.5) ln sigmoid(0) = 4 ln 2."""
    value = losses.npo(torch.tensor([4.0, 2.0]), torch.tensor([2.0, 2.0]), 0.5)
    expected = (4 * math.log(1 + math.exp(-1)) + 4 * math.log(2)) / 2
    torch.testing.assert_close(value, torch.tensor(expected))


def test_npo_starts_as_gradient_ascent_on_the_sum_and_saturates() -> None:
    nll = torch.tensor([3.0], requires_grad=True)
    losses.npo(nll, nll.detach(), 0.1).backward()
    torch.testing.assert_close(nll.grad, torch.tensor([-1.0]))  # -(2/b) * b * sigmoid(0) = -1
    far = torch.tensor([300.0], requires_grad=True)
    losses.npo(far, torch.tensor([3.0]), 0.1).backward()
    assert abs(float(far.grad)) < 1e-6


def test_masked_mse_by_hand() -> None:
    """H = 2. Token 0: ((1-0)^2 + (3-1)^2)/2 = 2.5; token 1: (4 + 4)/2 = 4; token 2 is masked. Mean 3.25."""
    states = torch.tensor([[[1.0, 3.0], [2.0, -1.0], [9.0, 9.0]]])
    target = torch.tensor([0.0, 1.0])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(losses.masked_mse(states, target, mask), torch.tensor(3.25))


def test_anchor_sums_over_experts_and_averages_over_real_tokens() -> None:
    """One target: token 0 is (.2-0)^2 + (.8-1)^2 = .08, token 1 is .5, token 2 is padding. Mean .29 (not /E)."""
    scores = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(losses.anchor(scores, (1,), mask), torch.tensor(0.29))


def test_anchor_of_two_targets_pulls_to_a_half_each() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.0]])
    assert float(losses.anchor(scores, (0, 1), torch.tensor([True]))) == 0
    one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(losses.anchor(one_hot, (0, 1), torch.tensor([True])), torch.tensor(0.5))


def test_control_vector_is_a_seeded_unit_vector_without_negative_entries() -> None:
    u = losses.control_vector(64, 3)
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    assert (u >= 0).all()
    assert torch.equal(u, losses.control_vector(64, 3))
    assert not torch.equal(u, losses.control_vector(64, 4))


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_cross_entropy_of_answer_logits_equals_transformers_own_loss(family: str) -> None:
    model = tiny.build_model(family)
    batch = collate(sequences(), 0)
    with torch.no_grad():
        answers = answer_logits(model, batch)
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    nll, tokens = losses.sequence_nll(answers.logits, answers.target, answers.row, answers.num_sequences)
    torch.testing.assert_close(losses.cross_entropy(nll, tokens), own)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_layer_states_equal_the_hidden_states_of_transformers(family: str) -> None:
    model = tiny.build_model(family)
    batch = collate(sequences(), 0)
    with torch.no_grad():
        full = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
        for layer in range(len(model.model.layers) - 1):  # transformers norms the last one
            torch.testing.assert_close(layer_states(model, layer, batch), full[layer + 1])
    assert len(model.model.layers) == model.config.num_hidden_layers


def test_layers_above_the_wanted_one_are_not_run() -> None:
    model = tiny.build_model("qwen2_moe")
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    layer_states(model, 1, collate(sequences(), 0))
    assert ran == [0, 1]


def test_padding_changes_no_likelihood() -> None:
    model = tiny.build_model("qwen2_moe")
    rows = sequences()
    with torch.no_grad():
        padded = answer_logits(model, collate(rows, 5))
        together = losses.sequence_nll(padded.logits, padded.target, padded.row, len(rows))[0]
        alone = []
        for row in rows:
            answers = answer_logits(model, collate([row], 0))
            alone.append(losses.sequence_nll(answers.logits, answers.target, answers.row, 1)[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
