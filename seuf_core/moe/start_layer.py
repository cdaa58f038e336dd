"""One sparse decoder layer whose expensive parts can be looked up instead of run (seuf_core.moe.parts)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from seuf_core.moe.parts import Part, listening, parts_of, rows_of, saying
from seuf_core.moe.passes import Flow, Route, run_layer
from seuf_core.moe.targets import frozen_by, frozen_forward
from seuf_core.moe.view import MoEView

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


class StartLayer:
    """The layer, watched once on the base model and then run with what it said.

    Args:
        view: with the layer loaded, as in the base model.
        index: decoder index of a sparse layer.
    """

    def __init__(self, view: MoEView, index: int) -> None:
        self._view, self._index, self._layer = view, index, view.layer(index)
        self._parts: list[Part] | None = None
        self._routed: Route | None = None

    def __call__(self, entry: torch.Tensor) -> torch.Tensor:
        """Output [B, S, H] of `entry`; only inside `saying`, which stands for all that looks at masks and positions."""
        assert self._routed is not None
        return run_layer(self._view, self._index, Flow(entry), self._routed).states

    @torch.no_grad()
    def watch(self, flow: Flow, routed: Route) -> Watched:
        """Run the layer as it is over a padded batch and note what happens."""
        asked: list[tuple[torch.Tensor, ...]] = []
        handle = self._layer.experts.register_forward_pre_hook(lambda _, given: asked.append(given))
        try:
            with listening(self._view, self._layer) as said:
                out = run_layer(self._view, self._index, flow, routed).states
        finally:
            handle.remove()
        tokens, width = flow.states.shape[:2].numel(), flow.states.shape[2]
        if self._parts is None:
            self._parts, self._routed = parts_of(said, tokens), routed
        (states, index, weights) = asked[0]
        return Watched(
            flow.states.view(tokens, width),
            out.reshape(tokens, width),
            tuple(rows_of(said, part, tokens) for part in self._parts),
            states,
            index,
            weights,
        )

    def saying(self, answers: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Inside the block each constant part answers [B, S, W] as given, whatever it is asked."""
        return saying(self._parts or (), answers)

    def experts_by(self, frozen: FrozenExperts) -> Any:
        """Inside this context the layer's frozen experts answer by `frozen`, whose target slots have weight 0."""
        return frozen_by(self._layer.experts, frozen)

    @torch.no_grad()
    def run_frozen(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's own experts as the model has them: see FrozenExperts."""
        return frozen_forward(self._view.model, self._layer.experts, states, index, weights)
