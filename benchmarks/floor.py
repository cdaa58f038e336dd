"""(f) The least a step can take: the matrix products of its suffix and nothing else, on the model's own weights.

Whatever is trained in layer l, a loss over logits needs the layers above it and the head once forward and, as nothing
there is trained, once backward for the activations. `Products` does exactly these products, layer after layer, so
that every weight comes from memory as it does in a step. It takes its turn beside ours, so that ours' share of the
limit is a ratio of one run. Left out: attention's own products, norms, softmax, the sorting of tokens by expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import grouped_mm

from seuf_core.moe.view import MoEView


class Products:
    """Forward and activation-backward products of `layers` over T tokens and of the head over P label positions.

    flops: of all of them; two a weight and token, in each direction.
    """

    def __init__(self, view: MoEView, layers: Iterable[int], tokens: int, labels: int) -> None:
        decoder, experts = (
            view.model.get_decoder().layers,
            {layer.index: layer.experts for layer in view.layers},
        )
        self._view, self._dense, self._experts = view, [], []
        for index in layers:
            routed = {id(weight) for weight in experts[index].parameters()} if index in experts else set()
            self._dense += [
                (weight.data, tokens)
                for weight in decoder[index].parameters()
                if weight.dim() == 2 and id(weight) not in routed
            ]
            if index in experts:
                self._experts += [experts[index].gate_up_proj.data, experts[index].down_proj.data]
        self._dense.append((view.model.get_output_embeddings().weight.data, labels))
        # As evenly as may be: the rows of one expert.
        self._rows = max(1, tokens * view.num_experts_per_tok // max(1, view.num_experts))
        self._inputs: dict[tuple[int, ...], torch.Tensor] = {}
        dense = sum(2 * weight.numel() * rows for weight, rows in self._dense)
        self.flops = 2 * (dense + sum(2 * weight.numel() * self._rows for weight in self._experts))

    @torch.no_grad()
    def __call__(self) -> None:
        """All of them once."""
        for weight, rows in self._dense:
            out, inside = weight.shape
            torch.mm(self._input(rows, inside, weight), weight.T)
            torch.mm(self._input(rows, out, weight), weight)
        for weight in self._experts:
            self._routed(weight.transpose(1, 2))
            self._routed(weight)

    def _routed(self, weights: torch.Tensor) -> None:
        """[E * rows, in] by [E, in, out], the rows of each expert by its own."""
        states = self._input(len(weights) * self._rows, weights.shape[1], weights)
        if weights.device.type == "cpu":  # one product after another is the fastest there
            for rows, weight in zip(states.split(self._rows), weights, strict=True):
                torch.mm(rows, weight)
        else:
            ends = torch.arange(1, len(weights) + 1, dtype=torch.int32, device=weights.device) * self._rows
            grouped_mm(states, weights, offs=ends)

    def _input(self, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width, dtype=like.dtype, device=like.device)
        return self._inputs[rows, width]
