"""What the routers decide: capture it, and forbid experts to see what happens without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from seuf_core.errors import MethodError
from seuf_core.families import Score
from seuf_core.moe.view import MoELayer, MoEView

_RouterHook = Callable[[nn.Module, object, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], None]
_Undo = Callable[[], None]


@dataclass
class Routing:
    """Router decisions of one forward pass, one entry a sparse layer, keyed by decoder layer index.

    logits: [T, E], as the router computed them; indices: [T, K], the experts it chose. T = B * S tokens, row-major.
    score: what the family's router makes of its logits before top-K.
    """

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    indices: dict[int, torch.Tensor] = field(default_factory=dict)
    score: Score = "softmax"

    def scores(self, layer: int) -> torch.Tensor:
        """The model's own scores before top-K, fp32 [T, E]: softmax (rows sum to 1) or sigmoid (each in 0..1).

        Without selection bias, group limits or renormalisation, which only choose or weigh (METHOD.md, section 1).
        """
        logits = self.logits[layer].float()
        return logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()

    def gates(self, layer: int) -> torch.Tensor:
        """`scores` where the model really selected the expert, else 0: [T, E]."""
        scores = self.scores(layer)
        return torch.zeros_like(scores).scatter(1, self.indices[layer], scores.gather(1, self.indices[layer]))

    def selected(self, layer: int) -> torch.Tensor:
        """1 where the expert was selected, else 0: [T, E]."""
        return torch.zeros_like(self.logits[layer], dtype=torch.float32).scatter(1, self.indices[layer], 1.0)


@contextmanager
def capture_routing(
    view: MoEView, layers: tuple[int, ...] | None = None, *, joined: bool = False
) -> Iterator[Routing]:
    """Record logits and chosen experts of each forward pass inside the block.

    A new pass overwrites the last or, `joined`, its tokens follow those of the passes before it.
    The graph is kept when gradients are on, so that the anchor can be built from what was captured.
    """
    routing = Routing(score=view.score)

    def record(index: int) -> _RouterHook:
        def hook(_: nn.Module, __: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            logits, indices = output[0], output[2]
            if joined and index in routing.logits:
                logits = torch.cat([routing.logits[index], logits])
                indices = torch.cat([routing.indices[index], indices])
            routing.logits[index], routing.indices[index] = logits, indices

        return hook

    handles = [
        layer.router.register_forward_hook(record(layer.index))
        for layer in view.layers
        if layers is None or layer.index in layers
    ]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def can_mask(view: MoEView, masked: Mapping[int, tuple[int, ...]]) -> bool:
    """Whether every layer keeps enough experts to fill its top-K; below that the router must pick forbidden ones."""
    return all(view.num_experts - len(experts) >= view.num_experts_per_tok for experts in masked.values())


@contextmanager
def experts_masked(view: MoEView, masked: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """Route every token away from the given experts (decoder layer index -> experts), for evaluation.

    The router sees one more input dimension that is always 1, whose weight is a large negative number for a
    forbidden expert and 0 for the others; a selection bias is that number there too. So top-K, renormalisation
    and groups stay the family's own code. Where only some groups of experts may be chosen from (DeepSeek, GLM-4)
    they may keep fewer than K: then a forbidden expert can fill a place, with gate 0.

    Raises:
        MethodError: `too_many_masked`, see `can_mask`.
    """
    if not can_mask(view, masked):
        raise MethodError(
            "too_many_masked",
            f"Masking leaves a layer fewer than its {view.num_experts_per_tok} experts per token.",
            "Mask fewer experts of one layer.",
        )
    restore = [_forbid(view.layer(index), experts) for index, experts in masked.items()]
    try:
        yield
    finally:
        for undo in restore:
            undo()


# Makes softmax and sigmoid exactly 0 in fp32, bf16 and fp16 and, unlike -inf, never yields NaN.
_PENALTY = -1e4


def _forbid(layer: MoELayer, experts: tuple[int, ...]) -> _Undo:
    projection, weight, bias = layer.projection, layer.projection.weight, layer.selection_bias
    penalty = torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    penalty[list(experts)] = _PENALTY
    projection.weight = nn.Parameter(torch.cat([weight.detach(), penalty], dim=1), requires_grad=False)
    reshapes = hasattr(projection, "hidden_dim")  # many routers flatten their input to rows of this size
    if reshapes:
        projection.hidden_dim += 1
    own = None if bias is None else bias.clone()
    if bias is not None:
        bias[list(experts)] = _PENALTY

    def add_constant(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0]
        return (torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], dim=-1), *inputs[1:])

    handle = projection.register_forward_pre_hook(add_constant)

    def undo() -> None:
        handle.remove()
        if reshapes:
            projection.hidden_dim -= 1
        projection.weight = weight
        if bias is not None and own is not None:
            bias.copy_(own)

    return undo
