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


def per_token(
    view: MoEView, answers: Answers, formula: Formula, *beside: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """A formula of the logits of each label token, [P] fp32; with a graph down to `answers.states`.

    Values and gradients are those of `formula(tail(view, answers.states), *beside)`, whatever the chunk. There is
    no second derivative. Without gradients the formula may give several numbers a token, [C, N].

    Memory: the logits of `chunk` positions and their graph, 4 * H bytes a position of an fp32 model and 2 * H of a
    bf16 one. Where norm or head are trained themselves the plain graph is kept, and so the logits of all positions.

    Args:
        formula: takes the logits of a chunk [C, V] and of each of `beside` the same positions. It must not mix them.
        beside: tensors [P, ...].
        chunk: positions at a time.
    """
    chunks = zip(*(tensor.split(chunk) for tensor in (answers.states, *beside)), strict=True)
    if not torch.is_grad_enabled() or not answers.states.requires_grad or trains_tail(view):
        return torch.cat([formula(tail(view, states), *rest) for states, *rest in chunks])
    values, slopes = [], []
    for states, *rest in chunks:
        leaf = states.detach().requires_grad_()
        value = formula(tail(view, leaf), *rest)
        slopes += torch.autograd.grad(value.sum(), leaf)
        values.append(value.detach())
    said: torch.Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        answers.states, torch.cat(values), torch.cat(slopes)
    )
    return said


def token_nll(view: MoEView, answers: Answers, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of each label token in nats, [P] fp32; see `per_token`."""
    return per_token(view, answers, negative_log_likelihood, answers.target, chunk=chunk)


def negative_log_likelihood(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of each label token, in nats: logits [P, V] and target [P] int64 to fp32 [P]."""
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


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
