"""The head a few positions at a time, against all logits at once: values and gradients, in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from seuf_core.moe.forward import Answers, Forward
from seuf_core.moe.head import negative_log_likelihood, per_token, token_nll
from seuf_core.moe.passes import tail
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import losses
from tests import tiny
from tests.families.common import EVERY_FAMILY
from tests.sequences import sequences

# Formulas of logits and target, with what they need of a reference made of the logits' own neighbours.
FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nll": negative_log_likelihood,
    "ce_u": losses.ce_u,
    "pdu": lambda z, _: losses.pdu(z),
    "kl": lambda z, y: losses.kl(z, reference(z, y)),
    "undial": lambda z, y: losses.undial(z, reference(z, y), y, 2.0),
}


def reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Other logits, of which those of a position depend on its target alone."""
    return torch.sin(torch.arange(logits.shape[1]) * (1.0 + target[:, None]))


def answers_of(family: str) -> tuple[MoEView, Answers]:
    """A frozen model, and answers whose states are a leaf."""
    view = moe_view(tiny.build_model(family))
    view.model.requires_grad_(False)
    with torch.no_grad():
        answers = Forward(view).answers(sequences())
    return view, replace(answers, states=answers.states.requires_grad_())


def close(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-6) -> None:
    """The difference is at most this share of what is expected, as a vector."""
    assert found.shape == expected.shape
    assert float((found - expected).detach().norm()) <= within * float(expected.detach().norm())


@EVERY_FAMILY
def test_values_and_gradients_by_the_states(family: str) -> None:
    view, answers = answers_of(family)
    upstream = torch.linspace(-1.0, 2.0, len(answers.target))
    for name, formula in FORMULAS.items():
        plain = formula(tail(view, answers.states), answers.target)
        [wanted] = torch.autograd.grad(plain, answers.states, upstream)
        for chunk in (1, 5, 64):
            found = per_token(view, answers, formula, answers.target, chunk=chunk)
            [gradient] = torch.autograd.grad(found, answers.states, upstream)
            assert found.dtype == torch.float32, name
            close(found, plain)
            # That of ce_u is the difference of two nearly equal distributions: digits cancel, with any chunk.
            close(gradient, wanted, within=5e-5 if name == "ce_u" else 1e-6)


@EVERY_FAMILY
def test_values_and_gradients_of_a_head_that_is_trained(family: str) -> None:
    view, answers = answers_of(family)
    layers = set(view.model.get_decoder().layers.parameters())
    trained = {name: p for name, p in view.model.named_parameters() if p not in layers}
    view.model.requires_grad_(True)
    upstream = torch.linspace(-1.0, 2.0, len(answers.target))

    def gradients(values: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {"states": answers.states, **trained}
        found = torch.autograd.grad(values, list(leaves.values()), upstream, allow_unused=True)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    wanted = gradients(negative_log_likelihood(tail(view, answers.states), answers.target))
    found = gradients(token_nll(view, answers, chunk=5))
    assert found.keys() == wanted.keys()
    assert len(wanted) >= 3  # states, norm, head
    for name, gradient in wanted.items():
        close(found[name], gradient)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_step_through_the_layers_has_the_gradient_of_the_whole_graph(chunk: int) -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    view.model.requires_grad_(False)
    weight = view.layer(0).router.weight.requires_grad_()
    answers = Forward(view).answers(sequences())
    squared = token_nll(view, answers, chunk=chunk).square().mean()
    [found] = torch.autograd.grad(squared, weight, retain_graph=True)
    plain = negative_log_likelihood(tail(view, answers.states), answers.target).square().mean()
    [wanted] = torch.autograd.grad(plain, weight)
    close(found, wanted, within=2e-6)
