"""A step in pieces, recomputed or not, is the step as a whole: every objective and retain term, loss and gradients."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from seuf_core import method as methods
from seuf_core.data.batches import Encoded
from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.moe.forward import Forward
from seuf_core.moe.view import moe_view
from seuf_core.unlearning.objectives import Terms, TrainingData, build_objective
from seuf_core.unlearning.scopes import ExpertScope, WholeModelScope
from tests import tiny
from tests.unlearning.test_objectives import (
    ALTERNATIVES,
    FORGET,
    KEPT,
    OBJECTIVES,
    PICKED,
    RETAIN,
    TARGETS,
    method,
    shaken,
)

# Of sequences of 3 to 13 tokens: one piece; several, one of them with forget and retain sequences; one each.
TOKENS = {None: 1, 24: 3, 1: 5}
EVERY_TERM = [
    (name, retain)
    for name in OBJECTIVES
    for retain in get_args(methods.RetainLoss)
    if retain
    in (("none", "hidden_mse") if name in HIDDEN_STATE_OBJECTIVES else ("none", "cross_entropy", "kl"))
    and (name, retain) != ("pdu", "none")
]
Gradients = dict[str, torch.Tensor]


def step(
    chosen: Method, tokens: int | None, recompute: bool, family: str = "qwen2_moe"
) -> tuple[Terms, Gradients]:
    """Terms and gradients of one step of a model that has trained a little, with references of the one before."""
    view = moe_view(tiny.build_model(family))
    whole = chosen.scope == "full"
    scope = WholeModelScope(view) if whole else ExpertScope(view, TARGETS, train_router=chosen.trains_router)
    data = TrainingData(FORGET, RETAIN, ALTERNATIVES if chosen.objective == "dpo" else [])
    forward = Forward(view, tokens=tokens, recompute=recompute)
    objective = build_objective(forward, chosen, data, {} if whole else TARGETS)
    shaken(view)
    with scope.attached():
        terms = objective(PICKED, KEPT)
        terms.total(chosen).backward()
    return terms, {n: p.grad for n, p in scope.named_parameters().items() if p.grad is not None}


BOTH = ((24, True),)
EACH = ((None, True), (24, False), (1, False))


def pieces_change_nothing(
    chosen: Method, ways: tuple[tuple[int | None, bool], ...] = BOTH, family: str = "qwen2_moe"
) -> None:
    # The gradient of ce_u is the difference of two nearly equal distributions: digits cancel.
    within = 1e-5 if chosen.objective == "ce_u" else 3e-6
    wanted, expected = step(chosen, None, False, family)
    assert expected
    total = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    for tokens, recompute in ways:
        terms, gradients = step(chosen, tokens, recompute, family)
        for part in ("forget", "retain", "anchor"):
            torch.testing.assert_close(getattr(terms, part), getattr(wanted, part), rtol=2e-6, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            difference = float((gradients[name] - gradient).norm())
            assert difference <= within * float(gradient.norm()) + within / 10 * total, (
                name,
                tokens,
                recompute,
            )


@pytest.mark.parametrize("router", ["freeze", "train"])
@pytest.mark.parametrize(("name", "retain_loss"), EVERY_TERM)
def test_pieces_and_recomputed_layers_change_nothing(name: str, retain_loss: str, router: str) -> None:
    pieces_change_nothing(method(name, retain_loss=retain_loss, router=router, anchor_weight=3.0))


@pytest.mark.parametrize("name", ["gradient_ascent", "undial"])
def test_nor_with_the_whole_model_trained(name: str) -> None:
    pieces_change_nothing(method(name, retain_loss="kl", scope="full"))


@pytest.mark.parametrize("family", ["qwen2_moe", "minimax_m2", "gpt_oss", "granitemoe"])
def test_nor_with_other_routers_nor_each_alone(family: str) -> None:
    pieces_change_nothing(method("npo", retain_loss="kl", router="train", anchor_weight=3.0), EACH, family)


def test_the_pieces_are_what_they_are_meant_to_be() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    rows: list[Encoded] = TrainingData(FORGET, RETAIN).rows(PICKED, KEPT)
    assert {tokens: len(Forward(view, tokens=tokens).pieces(rows)) for tokens in TOKENS} == TOKENS
    assert Forward(view, tokens=24).pieces(rows)[1] == [FORGET[PICKED[-1]], RETAIN[KEPT[0]]]
