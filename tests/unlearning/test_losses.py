"""Every loss against numbers worked by hand, and the things that must not change it.

Most use two examples over a vocabulary of 2. Logits (0, ln 3) give p = (1/4, 3/4); (0, 0) give (1/2, 1/2).
Example 0 has two label tokens, with p = 3/4 and p = 1/4: l = ln(4/3) + ln 4 = ln(16/3). Example 1 has one, with
p = 1/2: l = ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from seuf_core.data.batches import Batch, Encoded, collate
from seuf_core.moe.forward import Forward
from seuf_core.moe.head import negative_log_likelihood, token_nll
from seuf_core.moe.view import moe_view
from seuf_core.unlearning import losses
from tests import tiny
from tests.sequences import sequences

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
LOGITS = torch.tensor([[0.0, LN3], [0.0, LN3], [0.0, 0.0]])
REFERENCE = torch.tensor([[0.0, 0.0], [0.0, LN3], [LN3, 0.0]])
TARGET = torch.tensor([1, 0, 0])
ROW = torch.tensor([0, 0, 1])
TOKEN_NLL = torch.tensor([math.log(4 / 3), LN4, LN2])
L0, L1 = math.log(16 / 3), LN2
NLL, TOKENS = torch.tensor([L0, L1]), torch.tensor([2, 1])


def close(found: torch.Tensor, expected: float, **within: float) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=found.dtype), **within)  # type: ignore[arg-type]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_token_nll_is_minus_the_log_probability_of_the_label() -> None:
    torch.testing.assert_close(negative_log_likelihood(LOGITS, TARGET), TOKEN_NLL)


def test_l_is_the_sum_over_the_label_tokens_of_an_example() -> None:
    torch.testing.assert_close(losses.per_example(TOKEN_NLL, ROW, 2), NLL)
    assert losses.per_example(TOKEN_NLL, ROW + 1, 3)[0] == 0


def test_cross_entropy_is_the_mean_over_tokens() -> None:
    """(l_0 + l_1) / 3 tokens."""
    close(losses.cross_entropy(NLL, TOKENS), (L0 + L1) / 3)


def test_gradient_ascent_is_minus_the_mean_of_lbar() -> None:
    """-(l_0 / 2 + l_1 / 1) / 2: per example first, so a long answer weighs no more than a short one."""
    close(losses.gradient_ascent(NLL, TOKENS), -(L0 / 2 + L1) / 2)


def test_npo_by_hand() -> None:
    """b = .5, l = (4, 2), l_ref = (2, 2): -(2/.5) ln sigmoid(.5 * 2) and -(2/.5) ln sigmoid(0) = 4 ln 2."""
    value = losses.npo(torch.tensor([4.0, 2.0]), torch.tensor([2.0, 2.0]), 0.5)
    close(value, (-4 * log_sigmoid(1.0) + 4 * LN2) / 2)


def test_npo_starts_as_gradient_ascent_on_the_sum_and_saturates() -> None:
    nll = torch.tensor([3.0], requires_grad=True)
    losses.npo(nll, nll.detach(), 0.1).backward()
    torch.testing.assert_close(nll.grad, torch.tensor([-1.0]))  # -(2/b) * b * sigmoid(0) = -1
    far = torch.tensor([300.0], requires_grad=True)
    losses.npo(far, torch.tensor([3.0]), 0.1).backward()
    assert abs(float(far.grad)) < 1e-6


def test_simnpo_by_hand() -> None:
    """b = 2, d = .5, l = (3, 2) over (2, 1) tokens: lbar = (1.5, 2), b (lbar - d) = (2, 3).

    -(2/2) (ln sigmoid(2) + ln sigmoid(3)) / 2.
    """
    value = losses.simnpo(torch.tensor([3.0, 2.0]), TOKENS, 2.0, 0.5)
    close(value, -(log_sigmoid(2.0) + log_sigmoid(3.0)) / 2)


def test_simnpo_becomes_gradient_ascent_for_small_b_and_saturates() -> None:
    nll = torch.tensor([3.0, 2.0], requires_grad=True)
    losses.simnpo(nll, TOKENS, 1e-6, 0.0).backward()
    found, nll.grad = nll.grad, None
    losses.gradient_ascent(nll, TOKENS).backward()
    torch.testing.assert_close(found, nll.grad, rtol=1e-4, atol=0)
    assert float(losses.simnpo(torch.tensor([300.0]), torch.tensor([1]), 2.5, 0.0)) < 1e-6


def test_dpo_by_hand() -> None:
    """b = .5. Example 0: l_w 3 -> 1, l_l 2 -> 4: (3 - 1) - (2 - 4) = 4. Example 1: 1 -> 2, 3 -> 2: -1 - 1 = -2.

    -(2/.5) (ln sigmoid(2) + ln sigmoid(-1)) / 2.
    """
    before_w, now_w = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    before_l, now_l = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 2.0])
    value = losses.dpo(now_w, before_w, now_l, before_l, 0.5)
    close(value, -4 * (log_sigmoid(2.0) + log_sigmoid(-1.0)) / 2)


def test_dpo_prefers_the_alternative_and_is_npo_without_one() -> None:
    preferred, lost = torch.tensor([5.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    losses.dpo(preferred, preferred.detach(), lost, lost.detach(), 0.1).backward()
    torch.testing.assert_close(preferred.grad, torch.tensor([1.0]))  # its likelihood is to rise
    torch.testing.assert_close(lost.grad, torch.tensor([-1.0]))
    zero, now = torch.zeros(2), torch.tensor([4.0, 2.0])
    without = losses.dpo(zero, zero, now, torch.tensor([2.0, 2.5]), 0.3)
    torch.testing.assert_close(without, losses.npo(now, torch.tensor([2.0, 2.5]), 0.3))


def test_kl_by_hand() -> None:
    """KL(ref || current) of ref (1/2, 1/2) and current (1/4, 3/4): ln(2) / 2 + ln(2/3) / 2 = ln(4/3) / 2; of alike, 0.

    The other way round the first would be ln(1/2) / 4 + 3 ln(3/2) / 4.
    """
    torch.testing.assert_close(
        losses.kl(LOGITS[:2], REFERENCE[:2]), torch.tensor([math.log(4 / 3) / 2, 0.0]), rtol=1e-5, atol=1e-7
    )


def test_undial_by_hand() -> None:
    """b = ln 3. z_ref - b onehot(y): (0, -ln 3), (-ln 3, ln 3), (0, 0): targets (3/4, 1/4), (1/10, 9/10), (1/2, 1/2).

    The student says (1/4, 3/4), (1/4, 3/4), (1/2, 1/2): cross-entropies 3/4 ln 4 + 1/4 ln 4/3,
    1/10 ln 4 + 9/10 ln 4/3 and ln 2.
    """
    hard, easy = LN4, math.log(4 / 3)
    expected = torch.tensor([0.75 * hard + 0.25 * easy, 0.1 * hard + 0.9 * easy, LN2])
    torch.testing.assert_close(losses.undial(LOGITS, REFERENCE, TARGET, LN3), expected)


def test_undial_without_strength_distils_the_model_before_training() -> None:
    logits = REFERENCE.clone().requires_grad_()
    losses.undial(logits, REFERENCE, TARGET, 0.0).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 2))
    losses.undial(logits, REFERENCE, TARGET, 10.0).sum().backward()
    assert (logits.grad.gather(1, TARGET[:, None]) > 0).all()  # descent lowers the true token's logit


def test_ce_u_by_hand() -> None:
    """V = 3, z = (ln 1, ln 2, ln 5), y = 2: p = (1/8, 2/8, 5/8), target (1/3, 2/3, 0): ln 8 / 3 + 2 ln 4 / 3.

    Its gradient is p - target = (1/8 - 1/3, 1/4 - 2/3, 5/8): the target is not differentiated.
    """
    logits = torch.tensor([[0.0, LN2, math.log(5)]], requires_grad=True)
    value = losses.ce_u(logits, torch.tensor([2]))
    torch.testing.assert_close(value.detach(), torch.tensor([math.log(8) / 3 + 2 * LN4 / 3]))
    value.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 8 - 1 / 3, 1 / 4 - 2 / 3, 5 / 8]]))


def test_ce_u_of_each_token() -> None:
    """V = 2 leaves one token to say: -ln of the other's probability, ln 4, ln 4/3, ln 2."""
    torch.testing.assert_close(losses.ce_u(LOGITS, TARGET), torch.tensor([LN4, math.log(4 / 3), LN2]))


def test_wga_by_hand() -> None:
    """b = 2: (9/16 ln 3/4 + 1/16 ln 1/4 + 1/4 ln 1/2) / 3."""
    expected = (9 / 16 * math.log(3 / 4) + math.log(1 / 4) / 16 + math.log(1 / 2) / 4) / 3
    close(losses.wga(TOKEN_NLL, 2.0), expected)


def test_wga_ascends_by_its_weights() -> None:
    """d/d nll = -p^b / 3, the weight taken as given; b = 0 is ascent over tokens."""
    nll = TOKEN_NLL.clone().requires_grad_()
    losses.wga(nll, 2.0).backward()
    torch.testing.assert_close(nll.grad, -torch.tensor([9 / 16, 1 / 16, 1 / 4]) / 3)
    close(losses.wga(TOKEN_NLL, 0.0), -(L0 + L1) / 3)


def test_satimp_by_hand() -> None:
    """b1 = 2, b2 = 1: weights 9/16 * 1/4, 1/16 * 3/4, 1/4 * 1/2 of ln p = ln 3/4, ln 1/4, ln 1/2."""
    nll = TOKEN_NLL.clone().requires_grad_()
    value = losses.satimp(nll, 2.0, 1.0)
    weights = [9 / 64, 3 / 64, 1 / 8]
    close(value, (weights[0] * math.log(3 / 4) + weights[1] * math.log(1 / 4) - weights[2] * LN2) / 3)
    value.backward()
    torch.testing.assert_close(nll.grad, -torch.tensor(weights) / 3)


def test_satimp_without_importance_is_wga() -> None:
    torch.testing.assert_close(losses.satimp(TOKEN_NLL, 3.0, 0.0), losses.wga(TOKEN_NLL, 3.0))


def test_satimp_takes_a_likelihood_rounded_below_nothing() -> None:
    """-log p of a certain token may come out as -1e-8; (1 - p)^.5 of it would be no number."""
    assert float(losses.satimp(torch.tensor([-1e-8]), 5.0, 0.5)) == pytest.approx(0, abs=1e-9)


def test_pdu_by_hand() -> None:
    """z = (1, 2, 6): max 6, mean 3, squared 9. z = (2, 2, 2): 0."""
    value = losses.pdu(torch.tensor([[1.0, 2.0, 6.0], [2.0, 2.0, 2.0]]))
    torch.testing.assert_close(value, torch.tensor([9.0, 0.0]))


def test_pdu_pulls_the_largest_logit_down() -> None:
    """d/dz = 2 (max - mean) (onehot(max) - 1/V) = 6 * (-1/3, -1/3, 2/3)."""
    logits = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    losses.pdu(logits).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-2.0, -2.0, 4.0]]))


def test_mse_by_hand() -> None:
    """H = 2. Token 0: ((1-0)^2 + (3-1)^2)/2 = 2.5; token 1: (4 + 4)/2 = 4. Mean 3.25."""
    close(losses.mse(torch.tensor([[1.0, 3.0], [2.0, -1.0]]), torch.tensor([0.0, 1.0])), 3.25)


def test_anchor_sums_over_experts_and_averages_over_real_tokens() -> None:
    """One target: token 0 is (.2-0)^2 + (.8-1)^2 = .08, token 1 is .5, token 2 is padding. Mean .29 (not /E)."""
    scores = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    mask = torch.tensor([True, True, False])
    close(losses.anchor(scores, (1,), mask), 0.29)


def test_anchor_of_two_targets_pulls_to_a_half_each() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.0]])
    assert float(losses.anchor(scores, (0, 1), torch.tensor([True]))) == 0
    one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    close(losses.anchor(one_hot, (0, 1), torch.tensor([True])), 0.5)


def test_control_vector_is_a_seeded_unit_vector_without_negative_entries() -> None:
    u = losses.control_vector(64, 3)
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    assert (u >= 0).all()
    assert torch.equal(u, losses.control_vector(64, 3))
    assert not torch.equal(u, losses.control_vector(64, 4))


# name -> the loss of (logits [P, V], reference logits [P, V], target [P])
OF_TOKENS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda z, r, y: losses.cross_entropy(
        negative_log_likelihood(z, y).sum()[None], torch.tensor([len(y)])
    ),
    "kl": lambda z, r, y: losses.kl(z, r).mean(),
    "undial": lambda z, r, y: losses.undial(z, r, y, 2.0).mean(),
    "ce_u": lambda z, r, y: losses.ce_u(z, y).mean(),
    "wga": lambda z, r, y: losses.wga(negative_log_likelihood(z, y), 1.5),
    "satimp": lambda z, r, y: losses.satimp(negative_log_likelihood(z, y), 2.0, 1.5),
    "pdu": lambda z, r, y: losses.pdu(z).mean(),
}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_half_precision_is_accumulated_in_full(name: str) -> None:
    """The loss of bf16 logits is the loss of the same numbers in fp32, to the last bit, and is fp32."""
    generator = torch.Generator().manual_seed(0)
    z, r = (torch.randn(40, 300, generator=generator).bfloat16() * 4 for _ in range(2))
    y = torch.randint(300, (40,), generator=generator)
    found = OF_TOKENS[name](z, r, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, OF_TOKENS[name](z.float(), r.float(), y))


@pytest.mark.parametrize("name", ["kl", "undial", "ce_u", "cross_entropy", "wga", "satimp"])
def test_a_constant_added_to_the_logits_of_a_token_changes_nothing(name: str) -> None:
    shift = torch.tensor([[3.0], [-2.0], [40.0]])
    plain = OF_TOKENS[name](LOGITS, REFERENCE, TARGET)
    torch.testing.assert_close(OF_TOKENS[name](LOGITS + shift, REFERENCE - shift, TARGET), plain)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_each_token_weighs_alike(name: str) -> None:
    """The mean over tokens: twice the same batch is the same loss, and two batches of one size average."""
    generator = torch.Generator().manual_seed(1)
    z, r = (torch.randn(6, 5, generator=generator) for _ in range(2))
    y = torch.randint(5, (6,), generator=generator)
    whole = OF_TOKENS[name](z, r, y)
    alone = [OF_TOKENS[name](z[i : i + 1], r[i : i + 1], y[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(alone).mean())
    twice = OF_TOKENS[name](torch.cat([z, z]), torch.cat([r, r]), torch.cat([y, y]))
    torch.testing.assert_close(twice, whole)


def scattered(logits: torch.Tensor, target: torch.Tensor, row: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """The tokens of LOGITS in full rows [B, S, V] with other logits before, between and after them."""
    labels = torch.full((2, 4), -100)
    labels[0, 2:4], labels[1, 2] = target[row == 0], target[row == 1]
    everywhere = torch.full((2, 4, 2), 123.0)
    everywhere[0, 1:3], everywhere[1, 1] = logits[row == 0], logits[row == 1]
    return Batch(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4), labels), everywhere


def test_cross_entropy_of_transformers_on_full_rows_is_ours_on_label_rows() -> None:
    batch, everywhere = scattered(LOGITS, TARGET, ROW)
    own = F.cross_entropy(everywhere[:, :-1].reshape(-1, 2), batch.labels[:, 1:].reshape(-1))
    torch.testing.assert_close(losses.cross_entropy(NLL, TOKENS), own)


def test_kl_equals_torch() -> None:
    own = F.kl_div(LOGITS.log_softmax(-1), REFERENCE.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(losses.kl(LOGITS, REFERENCE).mean(), own)


def test_mse_and_its_gradient_are_those_of_the_mean_written_out() -> None:
    generator = torch.Generator().manual_seed(3)
    states, goal = (torch.randn(5, 4, generator=generator) for _ in range(2))
    for target in (goal, goal[0]):
        leaf = states.bfloat16().requires_grad_()
        found = losses.mse(leaf, target)
        torch.testing.assert_close(found, ((leaf.detach().float() - target) ** 2).sum() / 20)
        found.backward()
        slope = 2 * (leaf.detach().float() - target) / 20
        torch.testing.assert_close(leaf.grad, slope.bfloat16())


def test_undial_and_ce_u_equal_cross_entropy_with_soft_targets() -> None:
    generator = torch.Generator().manual_seed(2)
    z, r = (torch.randn(6, 5, generator=generator) for _ in range(2))
    y = torch.randint(5, (6,), generator=generator)
    one_hot = F.one_hot(y, 5)
    own = F.cross_entropy(z, F.softmax(r - 4.0 * one_hot, dim=-1))
    torch.testing.assert_close(losses.undial(z, r, y, 4.0).mean(), own)
    others = z.softmax(-1) * (1 - one_hot)
    own = F.cross_entropy(z, others / others.sum(-1, keepdim=True))
    torch.testing.assert_close(losses.ce_u(z, y).mean(), own)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@torch.no_grad()
def test_cross_entropy_of_what_the_head_says_equals_transformers_own_loss(family: str) -> None:
    view, batch = moe_view(tiny.build_model(family)), collate(sequences())
    answers = Forward(view).answers(sequences())
    own = view.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    nll = losses.per_example(token_nll(view, answers), answers.row, answers.num_sequences)
    torch.testing.assert_close(losses.cross_entropy(nll, torch.bincount(answers.row)), own)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_states_equal_the_hidden_states_of_transformers(family: str) -> None:
    model = tiny.build_model(family)
    batch, forward = collate(sequences()), Forward(moe_view(model))
    with torch.no_grad():
        full = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
        for layer in range(len(model.model.layers) - 1):  # transformers norms the last one
            states, _ = forward.states(sequences(), layer)
            torch.testing.assert_close(states, full[layer + 1][batch.predicts_label()])
    assert len(model.model.layers) == model.config.num_hidden_layers


def test_layers_above_the_wanted_one_are_not_run() -> None:
    model = tiny.build_model("qwen2_moe")
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    Forward(moe_view(model)).states(sequences(), 1)
    assert set(ran) == {0, 1}


@torch.no_grad()
def test_padding_changes_no_likelihood() -> None:
    view, rows = moe_view(tiny.build_model("qwen2_moe")), sequences()

    def likelihoods(together: list[Encoded]) -> torch.Tensor:
        answers = Forward(view).answers(together)
        return losses.per_example(token_nll(view, answers), answers.row, answers.num_sequences)

    alone = torch.cat([likelihoods([row]) for row in rows])
    torch.testing.assert_close(likelihoods(rows), alone, rtol=1e-5, atol=1e-5)
