"""(f) The least a step can take: the matrix products of its suffix and nothing else, on the model's own weights.

Whatever is trained in layer l, a loss over logits needs the layers above it and the head once forward and, as nothing
there is trained, once backward for the activations. `Products` does exactly these products, layer after layer, so
that every weight comes from memory as it does in a step. It takes its turn beside ours, so that ours' share of the
limit is a ratio of one run. Past the last layer's attention only positions count at which a label is predicted.
Left out: attention's own products, norms, softmax, the sorting of tokens by expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import grouped_mm

from seuf_core.moe.view import MoEView


class Products:
    """Forward and activation-backward products of `layers` over T tokens and of the head over P label positions.

    In the model's last layer everything but attention is over these P too: nothing else of it reaches the loss.

    flops: of all of them; two a weight and token, in each direction.
    """

    def __init__(self, view: MoEView, layers: Iterable[int], tokens: int, labels: int) -> None:
        decoder, share = view.model.get_decoder().layers, view.num_experts_per_tok / max(1, view.num_experts)
        experts = {layer.index: layer.experts for layer in view.layers}
        self._dense: list[tuple[torch.Tensor, int]] = []
        self._experts: list[tuple[torch.Tensor, int]] = []
        for index in layers:
            reaching = labels if index == view.num_layers - 1 else tokens
            attention = {id(weight) for weight in decoder[index].self_attn.parameters()}
            routed = {id(weight) for weight in experts[index].parameters()} if index in experts else set()
            self._dense += [
                (weight.data, tokens if id(weight) in attention else reaching)
                for weight in decoder[index].parameters()
                if weight.dim() == 2 and id(weight) not in routed
            ]
            if index in experts:
                rows = max(1, int(reaching * share))  # of one expert, as evenly as may be
                self._experts += [
                    (experts[index].gate_up_proj.data, rows),
                    (experts[index].down_proj.data, rows),
                ]
        self._dense.append((view.model.get_output_embeddings().weight.data, labels))
        self._inputs: dict[tuple[int, ...], torch.Tensor] = {}
        self.flops = 4 * sum(weight.numel() * rows for weight, rows in [*self._dense, *self._experts])

    @torch.no_grad()
    def __call__(self) -> None:
        """All of them once."""
        for weight, rows in self._dense:
            out, inside = weight.shape
            torch.mm(self._input(rows, inside, weight), weight.T)
            torch.mm(self._input(rows, out, weight), weight)
        for weight, rows in self._experts:
            self._routed(weight.transpose(1, 2), rows)
            self._routed(weight, rows)

    def _routed(self, weights: torch.Tensor, rows: int) -> None:
        """[E * rows, in] by [E, in, out], the rows of each expert by its own."""
        states = self._input(len(weights) * rows, weights.shape[1], weights)
        if weights.device.type == "cpu":  # one product after another is the fastest there
            for own, weight in zip(states.split(rows), weights, strict=True):
                torch.mm(own, weight)
        else:
            ends = torch.arange(1, len(weights) + 1, dtype=torch.int32, device=weights.device) * rows
            grouped_mm(states, weights, offs=ends)

    def _input(self, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width, dtype=like.dtype, device=like.device)
        return self._inputs[rows, width]
