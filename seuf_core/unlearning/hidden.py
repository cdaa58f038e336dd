"""Objectives over hidden states, which run no output head: rmu (arXiv 2403.03218), adaptive_rmu (arXiv 2408.06223)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from seuf_core.data.batches import Encoded
from seuf_core.errors import MethodError
from seuf_core.method import Method
from seuf_core.moe.forward import Forward
from seuf_core.moe.memory import within_memory
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import MoEView
from seuf_core.unlearning import losses
from seuf_core.unlearning.terms import Terms, TrainingData, anchor_of


def steered_layer(view: MoEView, method: Method, targets: dict[int, tuple[int, ...]]) -> int:
    """The decoder layer whose output RMU steers: `rmu_layer`, or the highest target layer.

    Raises:
        MethodError: no_such_layer, or layer_below_targets: nothing of a target layer above it would reach the loss.
    """
    layers, highest = len(view.model.get_decoder().layers), max(targets, default=None)
    layer = highest if method.rmu_layer == "auto" else method.rmu_layer
    if layer is None or layer >= layers:
        raise MethodError(
            "no_such_layer",
            f"rmu_layer is {method.rmu_layer}, and must name one of the model's layers, 0 to {layers - 1}.",
            f"Give a layer from {highest or 0} to {layers - 1}.",
            "/method/rmu_layer",
        )
    if highest is not None and layer < highest:
        raise MethodError(
            "layer_below_targets",
            f"rmu_layer {layer} lies below layer {highest}, where experts are trained that its output never sees.",
            f"Give a layer from {highest} to {layers - 1}, or leave rmu_layer out.",
            "/method/rmu_layer",
        )
    return layer


class HiddenStateObjective:
    """rmu and adaptive_rmu: push the output of one decoder layer to c * u on forget, hold it on retain.

    Nothing above that layer is run. Only positions that predict a label token count; means are over those of the
    batch (losses.mse). Adaptive RMU's c is `adaptive_rmu_scale` times the mean norm, over the label positions
    of the forget training part, of that output before training; RMU's is the same unless it is given.
    Memory of the retain reference (retain_loss hidden_mse): H numbers of the model's dtype for each label token of the
    retain training part, on the CPU.
    """

    def __init__(
        self,
        forward: Forward,
        method: Method,
        data: TrainingData,
        targets: dict[int, tuple[int, ...]],
        anchored: dict[int, tuple[int, ...]],
    ) -> None:
        self._forward, self._method, self._data, self._anchored = forward, method, data, anchored
        self._layer = steered_layer(forward.view, method, targets)
        held = data.retain if method.retain_loss == "hidden_mse" else []
        self._retain_reference = list(self._before(held))
        coefficient = method.rmu_coefficient
        if method.objective == "adaptive_rmu" or coefficient == "auto":
            norms = torch.cat([states.float().norm(dim=-1) for states in self._before(data.forget)])
            coefficient = method.adaptive_rmu_scale * float(norms.mean())
        hidden_size = forward.view.model.config.hidden_size
        goal = coefficient * losses.control_vector(hidden_size, method.seed)
        self._goal = goal.to(forward.view.model.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing is learned."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to take."""

    def halve(self, forget: Sequence[int], retain: Sequence[int]) -> bool:
        """Fewer sequences at once from now on; False at one."""
        return self._forward.halve(self._data.rows(forget, retain))

    @torch.no_grad()
    def _before(self, encoded: list[Encoded]) -> Iterator[torch.Tensor]:
        """Of each example: the states [P_i, H] before training where a label token is predicted, on the CPU."""
        for start in range(0, len(encoded), self._method.batch_size):
            rows = encoded[start : start + self._method.batch_size]
            states, row = within_memory(
                partial(self._forward.states, rows, self._layer),
                partial(self._forward.halve, rows),
                max(len(row.input_ids) for row in rows),
            )
            counts = torch.bincount(row, minlength=len(rows)).tolist()
            # Copies: a view would keep those of the whole batch alive.
            yield from (part.clone() for part in states.cpu().split(counts))

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        kept = retain if self._method.retain_loss == "hidden_mse" else []
        rows = self._data.rows(forget, kept)
        with capture_routing(self._forward.view, tuple(self._anchored), joined=True) as routing:
            states, row = self._forward.states(rows, self._layer, heard=self._anchored)
        steered = int((row < len(forget)).sum())  # the first: rows ascend
        forget_term = losses.mse(states[:steered], self._goal)
        retain_term = states.new_zeros((), dtype=torch.float32)
        if kept:
            reference = torch.cat([self._retain_reference[index] for index in kept]).to(states.device)
            retain_term = self._method.hidden_retain_weight * losses.mse(states[steered:], reference)
        pieces = self._forward.pieces(rows)
        anchor = anchor_of(routing, self._anchored, pieces, len(forget), states.device)
        return Terms(forget_term, retain_term, anchor)
