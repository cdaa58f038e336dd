"""What the model says of label tokens, from the states before its head, without the logits of all of them at once.

Logits take V numbers a position where states take H, and their graph three times as many. Here the head runs a few
positions at a time; each chunk's loss is taken back to its states at once, and only that gradient, [P, H], is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seuf_core.moe.forward import Answers
from seuf_core.moe.passes import tail
from seuf_core.moe.view import MoEView

# Positions that go through the head together. Below 256 the matrix product of a large vocabulary waits for its weights;
# above, only the memory grows.
CHUNK = 256

# Logits [C, V] in the model's dtype, and what was given of each of these positions -> [C] fp32.
Formula = Callable[..., torch.Tensor]
# The same -> values [C] fp32 and the derivative of each by its logits, [C, V] in their dtype. No graph.
Derivative = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def per_token(
    view: MoEView,
    answers: Answers,
    formula: Formula,
    *beside: torch.Tensor,
    derivative: Derivative | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """A formula of the logits of each label token, [P] fp32; with a graph down to `answers.states`.

    Values and gradients are those of `formula(tail(view, answers.states), *beside)`, whatever the chunk. There is
    no second derivative. Without gradients the formula may give several numbers a token, [C, N].

    Memory: the logits of `chunk` positions and their graph, 4 * H bytes a position of an fp32 model and 2 * H of a
    bf16 one. Where norm or head are trained themselves the plain graph is kept, and so the logits of all positions.

    Args:
        formula: takes the logits of a chunk [C, V] and of each of `beside` the same positions. It must not mix them.
        beside: tensors [P, ...].
        derivative: of the formula, where it is known in closed form.
        chunk: positions at a time.
    """
    chunks = zip(*(tensor.split(chunk) for tensor in (answers.states, *beside)), strict=True)
    if not torch.is_grad_enabled() or not answers.states.requires_grad or trains_tail(view):
        return torch.cat([formula(tail(view, states), *rest) for states, *rest in chunks])
    derivative, values, slopes = derivative or _derivative(formula), [], []
    for states, *rest in chunks:
        leaf = states.detach().requires_grad_()
        logits = tail(view, leaf)
        value, slope = derivative(logits.detach(), *rest)
        slopes += torch.autograd.grad(logits, leaf, slope)
        values.append(value)
    said: torch.Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        answers.states, torch.cat(values), torch.cat(slopes)
    )
    return said


def token_nll(view: MoEView, answers: Answers, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of each label token in nats, [P] fp32; see `per_token`."""
    return per_token(
        view, answers, negative_log_likelihood, answers.target, derivative=_nll_derivative, chunk=chunk
    )


def negative_log_likelihood(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of each label token, in nats: logits [P, V] and target [P] int64 to fp32 [P]."""
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


@torch.no_grad()
def _nll_derivative(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p and softmax - 1[target]: two passes over [C, V] where autograd takes five."""
    said = logits.log_softmax(dim=-1, dtype=torch.float32)
    position = torch.arange(len(target), device=target.device)
    value = -said[position, target]
    slope = said.exp_()
    slope[position, target] -= 1
    return value, slope.to(logits.dtype)


def _derivative(formula: Formula) -> Derivative:
    """By autograd."""

    @torch.enable_grad()
    def run(logits: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.requires_grad_()
        value = formula(leaf, *beside)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    return run


def trains_tail(view: MoEView) -> bool:
    """Whether anything outside the decoder layers is trained: the norm, the head or, tied to it, the embeddings."""
    within = {id(parameter) for parameter in view.model.get_decoder().layers.parameters()}
    return any(p.requires_grad for p in view.model.parameters() if id(p) not in within)


class _Chunked(torch.autograd.Function):
    """Values [P] whose gradient by the states they came from is known: [P, H]."""

    @staticmethod
    def forward(ctx: Any, _states: torch.Tensor, values: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None
