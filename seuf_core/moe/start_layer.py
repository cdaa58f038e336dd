"""One sparse decoder layer whose expensive parts can be looked up instead of run.

Past attention and its like, everything in a decoder layer looks at one token at a time. With what attention said given,
the layer's own code (norms, residuals, router, weighting, scaling) runs on any tokens, packed as one likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seuf_core.moe.passes import Flow, Route, run_layer
from seuf_core.moe.targets import frozen_by, frozen_forward
from seuf_core.moe.view import MoELayer, MoEView

# Answers of frozen experts: states [T, H], index [T, K], weights [T, K] -> [T, H].
FrozenExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Watched:
    """What happened in the layer with T tokens of a padded batch, row-major.

    entry, out: [T, H], what flowed in and out. parts: [T, W] each, what its constant parts said.
    states: [T, H], index: [T, K], weights: [T, K], what its experts were asked.
    """

    entry: torch.Tensor
    out: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class _Part:
    """A constant part of the layer, and the form of its answer: tokens in one axis or two, a tuple of how many."""

    module: nn.Module
    flat: bool
    outputs: int


class StartLayer:
    """The layer, watched once on the base model and then run with what it said.

    Args:
        view: with the layer loaded, as in the base model.
        index: decoder index of a sparse layer.
    """

    def __init__(self, view: MoEView, index: int) -> None:
        self._view, self._index, self._layer = view, index, view.layer(index)
        self._parts: list[_Part] | None = None
        self._routed: Route | None = None

    def __call__(self, entry: torch.Tensor) -> torch.Tensor:
        """Output [B, S, H] of `entry`; only inside `saying`, which stands for all that looks at masks and positions."""
        assert self._routed is not None
        return run_layer(self._view, self._index, Flow(entry), self._routed).states

    @torch.no_grad()
    def watch(self, flow: Flow, routed: Route) -> Watched:
        """Run the layer as it is over a padded batch and note what happens."""
        said: dict[nn.Module, list[Any]] = {part: [] for part in _constant_parts(self._view, self._layer)}
        asked: list[tuple[torch.Tensor, ...]] = []
        handles = [part.register_forward_hook(lambda m, _, out: said[m].append(out)) for part in said]
        handles.append(self._layer.experts.register_forward_pre_hook(lambda _, given: asked.append(given)))
        try:
            out = run_layer(self._view, self._index, flow, routed).states
        finally:
            for handle in handles:
                handle.remove()
        tokens = flow.states.shape[:2].numel()
        outputs = {module: answers[0] for module, answers in said.items() if len(answers) == 1}
        if self._parts is None:
            self._parts = _parts_of(outputs, tokens)
            self._routed = routed
        answers = [_bare(outputs[part.module]).reshape(tokens, -1) for part in self._parts]
        (states, index, weights) = asked[0]
        width = flow.states.shape[2]
        return Watched(
            flow.states.view(tokens, width),
            out.reshape(tokens, width),
            tuple(answers),
            states,
            index,
            weights,
        )

    @contextmanager
    def saying(self, answers: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside the block each constant part answers [B, S, W] as given, whatever it is asked."""
        with ExitStack() as stack:
            for part, answer in zip(self._parts or (), answers, strict=True):
                value = answer.flatten(0, 1) if part.flat else answer
                shaped = (value, *[None] * (part.outputs - 1)) if part.outputs else value
                stack.enter_context(_answering(part.module, shaped))
            yield

    def experts_by(self, frozen: FrozenExperts) -> Any:
        """Inside this context the layer's frozen experts answer by `frozen`, whose target slots have weight 0."""
        return frozen_by(self._layer.experts, frozen)

    @torch.no_grad()
    def run_frozen(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's own experts as the model has them: see FrozenExperts."""
        return frozen_forward(self._view.model, self._layer.experts, states, index, weights)


def _constant_parts(view: MoEView, layer: MoELayer) -> list[nn.Module]:
    """The modules beside router and experts that cost: those with a matrix, on every level down to the experts.

    They come before the experts or beside them, so no target reaches what they are asked (tests/families).
    """
    keep = {layer.router, layer.experts}
    found: list[nn.Module] = []
    within: nn.Module = view.model.get_decoder().layers[layer.index]
    while within is not layer.experts:
        inner = next(child for child in within.children() if layer.experts in set(child.modules()))
        found += [
            child
            for child in within.children()
            if child is not inner
            and not keep & set(child.modules())
            and any(parameter.dim() > 1 for parameter in child.parameters())
        ]
        within = inner
    return found


def _parts_of(outputs: dict[nn.Module, Any], tokens: int) -> list[_Part]:
    """Those that answered once, a row for each token."""
    parts = []
    for module, output in outputs.items():
        bare = _bare(output)
        flat = bare.shape[0] == tokens and bare.dim() == 2
        if flat or bare.shape[:2].numel() == tokens:
            parts.append(_Part(module, flat, len(output) if isinstance(output, tuple) else 0))
    return parts


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
