"""PDU's dual variable: how it moves, from where, and that a resumed run has the same one."""

from __future__ import annotations

import pytest
import torch

from seuf_core.unlearning.likelihood import DualWeight
from tests.unlearning.test_objectives import KEPT, PICKED, RETAIN, build, close, l, logits_of, seen, shaken


def test_the_dual_step_by_hand() -> None:
    """lambda 1, eps 2, eta .5: loss 3 -> 1.5, loss 2 -> 1.5, loss 1 -> 1, loss -1 -> max(0, -.5) = 0, loss 4 -> 1."""
    dual = DualWeight(start=1.0, bound=2.0, rate=0.5)
    found = []
    for loss in (3.0, 2.0, 1.0, -1.0, 4.0):
        dual.update(loss)
        found.append(dual.value)
    assert found == [1.5, 1.5, 1.0, 0.0, 1.0]


def test_the_bound_is_the_base_models_mean_retain_loss_and_the_slack() -> None:
    """Mean over the label tokens of the whole training part: sum of l / number of tokens."""
    view, _, terms_of = build("pdu", pdu_slack=0.25, retain_loss="cross_entropy")
    examples = seen(view, RETAIN, [logits_of(view, row)[0] for row in RETAIN])
    expected = sum(l(example) for example in examples) / sum(len(example) for example in examples)
    assert terms_of._dual.bound == pytest.approx(expected + 0.25, rel=1e-5)  # type: ignore[attr-defined]
    _, _, divergent = build("pdu", pdu_slack=0.25, retain_loss="kl")
    assert divergent._dual.bound == 0.25  # type: ignore[attr-defined]


def test_each_step_weighs_by_the_weight_before_it() -> None:
    view, chosen, terms_of = build("pdu", retain_weight=2.0, pdu_rate=0.5, pdu_slack=0.0, retain_loss="kl")
    shaken(view)
    weight = 2.0
    for _ in range(3):
        terms = terms_of(PICKED, KEPT)
        assert terms.retain_weight == pytest.approx(weight, rel=1e-6)
        close(terms.total(chosen), terms.forget.detach() + weight * terms.retain.detach())
        weight += 0.5 * float(terms.retain.detach())
    assert weight > 2.01


def test_the_weight_survives_its_state_to_the_last_bit() -> None:
    view, _, terms_of = build("pdu", pdu_rate=0.1, retain_weight=1.0)
    shaken(view)
    for _ in range(3):
        terms_of(PICKED, KEPT)
    state = terms_of.state()
    goes_on = [terms_of(PICKED, KEPT).retain_weight for _ in range(2)]
    terms_of.load_state(state)
    assert [terms_of(PICKED, KEPT).retain_weight for _ in range(2)] == goes_on
    assert goes_on[0] == float(state["retain_weight"])
    assert goes_on[0] != float(state["retain_weight"].float())  # a rounded weight would not be the same
    terms_of.load_state({})
    assert terms_of(PICKED, KEPT).retain_weight == 1.0


def test_without_retain_rows_the_weight_stays() -> None:
    _, _, terms_of = build("pdu", retain_weight=2.0)
    terms_of(PICKED, [])
    assert float(terms_of.state()["retain_weight"]) == 2.0


def test_the_weight_has_no_gradient() -> None:
    _, _, terms_of = build("pdu")
    terms = terms_of(PICKED, KEPT)
    assert isinstance(terms.retain_weight, float)
    assert not any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in terms_of.state().values()
    )
