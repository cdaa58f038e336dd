"""The parts of a sparse decoder layer beside router and experts: what they said, and the layer run on that.

Past attention and its like, everything in a decoder layer looks at one token at a time. With what attention said given,
the layer's own code (norms, residuals, router, weighting, scaling) runs on any tokens, packed as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seuf_core.moe.passes import Flow, Route, ending_at, run_layer
from seuf_core.moe.view import MoELayer, MoEView

# Each part, and what it said every time it was asked.
Said = Mapping[nn.Module, list[Any]]


@dataclass(frozen=True)
class Part:
    """A part that answered once, and the form of its answer: tokens in one axis or two, a tuple of how many."""

    module: nn.Module
    flat: bool
    outputs: int


@contextmanager
def listening(view: MoEView, layer: MoELayer) -> Iterator[Said]:
    """What the parts of the layer say inside the block.

    They come before the experts or beside them, so no target reaches what they are asked (tests/families).
    """
    said: dict[nn.Module, list[Any]] = {part: [] for part in _beside_experts(view, layer)}
    handles = [part.register_forward_hook(lambda m, _, out: said[m].append(out)) for part in said]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def parts_of(said: Said, tokens: int) -> list[Part]:
    """Those that answered once, a row for each of so many tokens."""
    parts = []
    for module, answers in said.items():
        if len(answers) != 1:
            continue
        answer = _bare(answers[0])
        flat = answer.shape[0] == tokens and answer.dim() == 2
        if flat or answer.shape[:2].numel() == tokens:
            outputs = len(answers[0]) if isinstance(answers[0], tuple) else 0
            parts.append(Part(module, flat, outputs))
    return parts


def rows_of(said: Said, part: Part, tokens: int) -> torch.Tensor:
    """What a part said, [T, W]."""
    return _bare(said[part.module][0]).reshape(tokens, -1)


@contextmanager
def saying(parts: Sequence[Part], answers: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block each part answers [B, S, W] as given, whatever it is asked."""
    with ExitStack() as stack:
        for part, answer in zip(parts, answers, strict=True):
            value = answer.flatten(0, 1) if part.flat else answer
            shaped = (value, *[None] * (part.outputs - 1)) if part.outputs else value
            stack.enter_context(_answering(part.module, shaped))
        yield


def run_layer_at(view: MoEView, index: int, flow: Flow, routed: Route, at: torch.Tensor) -> torch.Tensor:
    """What decoder layer `index` gives at some positions, [P, H]: its router and experts run on these alone.

    Values and gradients are those of `run_layer(...).states[at]`. Router hooks hear of P tokens, not of all.

    Args:
        at: [B, S] bool, P of them true.
    """
    if index not in view.layer_indices:
        return run_layer(view, index, flow, routed).states[at]
    layer, whole = view.layer(index), view.model.get_decoder().layers[index]
    with listening(view, layer) as said, ending_at(_holder(whole, layer)):
        run_layer(view, index, flow, routed)
    tokens = at.numel()
    where = at.flatten().nonzero()[:, 0]
    parts = parts_of(said, tokens)
    answers = [rows_of(said, part, tokens)[where][None] for part in parts]
    with saying(parts, answers):
        return run_layer(
            view, index, Flow(flow.states.flatten(0, 1)[where][None], flow.carried), routed
        ).states[0]


def _holder(within: nn.Module, layer: MoELayer) -> nn.Module:
    """The child of a module that has the layer's experts, or is them."""
    return next(child for child in within.children() if layer.experts in set(child.modules()))


def _beside_experts(view: MoEView, layer: MoELayer) -> list[nn.Module]:
    """The modules beside router and experts that cost: those with a matrix, on every level down to the experts."""
    keep = {layer.router, layer.experts}
    found: list[nn.Module] = []
    within: nn.Module = view.model.get_decoder().layers[layer.index]
    while within is not layer.experts:
        inner = _holder(within, layer)
        found += [
            child
            for child in within.children()
            if child is not inner
            and not keep & set(child.modules())
            and any(parameter.dim() > 1 for parameter in child.parameters())
        ]
        within = inner
    return found


def _bare(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextmanager
def _answering(module: nn.Module, value: Any) -> Iterator[None]:
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        del module.forward
