"""The terms of the training loss by hand-worked numbers, and the loop's schedule and batches."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from seuf_core.moe.routing import Routing
from seuf_core.reference.architecture import RECIPES
from seuf_core.reference.training import (
    Sentence,
    batches,
    collate,
    domain_router_means,
    learning_rate_factor,
    load_balance,
    mutual_information,
    routing_loss,
)

TINY = RECIPES["tiny"]


def test_information_is_zero_when_all_domains_are_routed_alike() -> None:
    means = torch.tensor([[0.7, 0.2, 0.1]] * 3)
    assert mutual_information(means, torch.tensor([0.2, 0.3, 0.5])).item() == pytest.approx(0, abs=1e-6)


def test_information_is_ln2_when_two_domains_never_share_an_expert() -> None:
    means = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    assert mutual_information(means, torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2), abs=1e-6)


def test_information_by_hand() -> None:
    """p(d) = 1/2 each, p(e|0) = (3/4, 1/4), p(e|1) = (1/4, 3/4): H(e) = ln 2, H(e|d) = ln 4 - 3/4 ln 3."""
    means = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    expected = math.log(2) - (math.log(4) - 0.75 * math.log(3))
    assert mutual_information(means, torch.tensor([0.5, 0.5])).item() == pytest.approx(expected, abs=1e-6)


def test_router_means_leave_padding_out() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [9.0, -9.0]])
    means, shares = domain_router_means(logits, torch.tensor([0, 1, -1]), num_domains=2)
    torch.testing.assert_close(means, torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5]))


def test_load_balance_is_one_when_even_and_num_experts_when_collapsed() -> None:
    counted = torch.tensor([True] * 4)
    even = load_balance(torch.zeros(4, 4), torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]), counted)
    assert even.item() == pytest.approx(1.0)
    collapsed = load_balance(
        torch.tensor([[50.0, 0, 0, 0]] * 4), torch.zeros(4, 1, dtype=torch.int64), counted
    )
    assert collapsed.item() == pytest.approx(4.0)


def test_load_balance_counts_no_padding() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [50.0, 0.0]])
    selected = torch.tensor([[0], [1], [0]])
    assert load_balance(logits, selected, torch.tensor([True, True, False])).item() == pytest.approx(1.0)


def routed(logits: torch.Tensor) -> Routing:
    return Routing(logits={0: logits}, indices={0: logits.topk(2).indices})


def test_descending_the_routing_loss_specialises_up_to_tau_and_no_further() -> None:
    generator = torch.Generator().manual_seed(0)
    domains = torch.arange(90) % 3
    logits = (0.1 * torch.randn(90, 8, generator=generator)).requires_grad_()
    recipe = replace(TINY, specialisation_weight=1.0)
    for _ in range(300):
        loss = routing_loss(routed(logits), domains, 3, recipe, tau=0.2)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 30 * gradient).detach().requires_grad_()
    information = mutual_information(*domain_router_means(logits, domains, 3)).item()
    assert information == pytest.approx(0.2, abs=0.02)
    slots = torch.bincount(logits.topk(2).indices.flatten(), minlength=8) / 180
    assert slots.max() < 0.2  # even is .125: specialised, and yet balanced


def test_natural_routing_pays_for_imbalance_only() -> None:
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    domains = torch.arange(12) % 3
    balance = load_balance(logits, logits.topk(2).indices, domains >= 0)
    loss = routing_loss(routed(logits), domains, 3, TINY, tau=0.0)
    assert loss.item() == pytest.approx(TINY.balance_weight * balance.item())


def test_collate_weighs_answer_and_end_fully_and_padding_not_at_all() -> None:
    batch = collate([Sentence([5, 6, 7, 0], 2, 1), Sentence([8, 0], 1, 0)], pad=9, prompt_weight=0.2)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 0, 9, 9]]
    torch.testing.assert_close(batch.weights, torch.tensor([[0, 0.2, 1, 1], [0, 1, 0, 0]]))
    assert batch.answers.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.domains.tolist() == [[1, 1, 1, 1], [0, 0, -1, -1]]


def test_the_rate_warms_up_to_one_and_falls_to_two_percent() -> None:
    recipe = replace(TINY, warmup_steps=10, steps=110)
    factors = [learning_rate_factor(step, recipe) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.51)
    assert factors[110] == pytest.approx(0.02)


def test_an_epoch_of_batches_holds_every_sentence_once() -> None:
    sentences = [Sentence([i] * (1 + i % 5), 1, 0) for i in range(100)]
    recipe = replace(TINY, batch_size=8)
    stream = list(islice(batches(sentences, recipe, torch.Generator().manual_seed(3)), 13))
    assert sorted(sentence.ids[0] for batch in stream for sentence in batch) == list(range(100))
    again = list(islice(batches(sentences, recipe, torch.Generator().manual_seed(3)), 13))
    assert stream == again
