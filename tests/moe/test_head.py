"""What the head takes in memory, in which precision it works, and when it keeps no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seuf_core.evaluate.probes import EncodedProbe, score_probes
from seuf_core.moe.forward import Answers, Forward
from seuf_core.moe.head import CHUNK, negative_log_likelihood, per_token, token_nll, trains_tail
from seuf_core.moe.passes import tail
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.evaluate.test_probes import probe
from tests.unlearning.test_objectives import build, rows

V = tiny.VOCAB_SIZE
# 420 label tokens: rows so few and short that nothing inside a layer is larger than the logits of a chunk.
MANY = [replace(row, labels_from=1) for row in rows((8,) * 60, 3)]


class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor that anything gives, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def frozen(dtype: torch.dtype = torch.float32) -> MoEView:
    view = moe_view(tiny.build_model("qwen2_moe").to(dtype))
    view.model.requires_grad_(False)
    return view


def answers_of(view: MoEView) -> Answers:
    with torch.no_grad():
        answers = Forward(view).answers(MANY)
    return replace(answers, states=answers.states.requires_grad_())


def test_no_more_logits_than_of_a_chunk() -> None:
    view = frozen()
    answers = answers_of(view)
    assert len(answers.target) == 420
    with Largest() as chunked:
        token_nll(view, answers, chunk=64).sum().backward()
    assert chunked.numbers == 64 * V
    with Largest() as plain:
        negative_log_likelihood(tail(view, answers.states), answers.target).sum().backward()
    assert plain.numbers == 420 * V  # the measure sees them


@pytest.mark.parametrize(
    ("name", "retain_loss"), [("npo", "kl"), ("undial", "cross_entropy"), ("ce_u", "kl"), ("pdu", "kl")]
)
def test_a_step_of_an_objective_has_no_logits_of_all_positions(name: str, retain_loss: str) -> None:
    view, chosen, terms_of = build(name, MANY, MANY, retain_loss=retain_loss)
    view.model.requires_grad_(False)
    for layer in view.layers:
        layer.router.weight.requires_grad_()
    with Largest() as seen:
        terms_of(range(60), range(60)).total(chosen).backward()
    assert seen.numbers == CHUNK * V


def test_probes_make_no_logits_of_all_positions() -> None:
    scored = EncodedProbe(probe(0, ("a",) * 60, 0), tuple(MANY))
    with Largest() as seen:
        score_probes(Forward(frozen()), [scored])
    assert seen.numbers == CHUNK * V


def test_bf16_is_accumulated_in_full() -> None:
    """Values to the last bit; gradients to the rounding of bf16, in which both are."""
    view = frozen(torch.bfloat16)
    answers = answers_of(view)
    found = token_nll(view, answers, chunk=7)
    plain = negative_log_likelihood(tail(view, answers.states), answers.target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    [gradient] = torch.autograd.grad(found.mean(), answers.states)
    [wanted] = torch.autograd.grad(plain.mean(), answers.states)
    assert gradient.dtype == torch.bfloat16
    assert float((gradient - wanted).float().norm()) < 1e-2 * float(wanted.float().norm())


def test_without_a_graph_nothing_is_differentiated() -> None:
    """Neither under no_grad nor where nothing below is trained; then a formula may give several numbers."""
    view = frozen()
    answers = answers_of(view)
    backward: list[int] = []
    view.model.lm_head.register_full_backward_hook(lambda *_: backward.append(1))
    with torch.no_grad():
        assert not token_nll(view, answers).requires_grad
    detached = replace(answers, states=answers.states.detach())
    assert not token_nll(view, detached).requires_grad
    pairs = per_token(view, detached, lambda z: z[:, :2], chunk=9)
    torch.testing.assert_close(pairs, tail(view, detached.states)[:, :2])
    assert not backward
    token_nll(view, answers)
    assert backward


def test_there_is_no_second_derivative() -> None:
    view = frozen()
    answers = answers_of(view)
    [once] = torch.autograd.grad(token_nll(view, answers).square().sum(), answers.states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_the_tail_is_what_is_outside_the_layers() -> None:
    view = frozen()
    assert not trains_tail(view)
    view.model.get_decoder().layers.requires_grad_(True)
    assert not trains_tail(view)
    for part in (view.model.lm_head, view.model.model.norm):
        part.requires_grad_(True)
        assert trains_tail(view)
        part.requires_grad_(False)
