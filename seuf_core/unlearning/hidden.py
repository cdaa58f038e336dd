"""Objectives over hidden states, which run no output head: rmu (arXiv 2403.03218), adaptive_rmu (arXiv 2408.06223)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seuf_core.data.batches import Encoded, collate
from seuf_core.errors import MethodError
from seuf_core.method import Method
from seuf_core.moe.forward import Forward, layer_states
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
    batch (losses.masked_mse). Adaptive RMU's c is `adaptive_rmu_scale` times the mean norm, over the label positions
    of the forget training part, of that output before training; RMU's is the same unless it is given.
    Memory of the retain reference (retain_loss hidden_mse): 4 * H bytes a real token of the retain
    training part, on the CPU.
    """

    def __init__(
        self,
        forward: Forward,
        method: Method,
        data: TrainingData,
        targets: dict[int, tuple[int, ...]],
        anchored: dict[int, tuple[int, ...]],
    ) -> None:
        view = forward.view
        self._view, self._method, self._data, self._anchored = view, method, data, anchored
        self._layer = steered_layer(view, method, targets)
        held = data.retain if method.retain_loss == "hidden_mse" else []
        self._retain_reference = [states for states, _ in self._states(held)]
        coefficient = method.rmu_coefficient
        if method.objective == "adaptive_rmu" or coefficient == "auto":
            norms = torch.cat([states[mask].norm(dim=-1) for states, mask in self._states(data.forget)])
            coefficient = method.adaptive_rmu_scale * float(norms.mean())
        hidden_size = view.model.config.hidden_size
        self._goal = coefficient * losses.control_vector(hidden_size, method.seed).to(view.model.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing is learned."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to take."""

    @torch.no_grad()
    def _states(self, encoded: list[Encoded]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per example: states [S_i, H] fp32 under the model before training, and which of them predict a label."""
        found = []
        for start in range(0, len(encoded), self._method.batch_size):
            rows = encoded[start : start + self._method.batch_size]
            batch = collate(rows).to(self._view.model.device)
            states = layer_states(self._view.model, self._layer, batch).float().cpu()
            mask = batch.predicts_label().cpu()
            # Copies: a view would keep the padding of its whole batch alive.
            found += [
                (states[i, : len(r.input_ids)].clone(), mask[i, : len(r.input_ids)])
                for i, r in enumerate(rows)
            ]
        return found

    def halve(self, _forget: Sequence[int], _retain: Sequence[int]) -> bool:
        """One pass it is."""
        return False

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        kept = retain if self._method.retain_loss == "hidden_mse" else []
        rows, n = self._data.rows(forget, kept), len(forget)
        batch = collate(rows).to(self._view.model.device)
        with capture_routing(self._view, tuple(self._anchored)) as routing:
            states = layer_states(self._view.model, self._layer, batch)
        mask = batch.predicts_label()
        forget_term = losses.masked_mse(states[:n], self._goal, mask[:n])
        retain_term = states.new_zeros((), dtype=torch.float32)
        if kept:
            reference = self._reference(kept, states.shape[1]).to(states.device)
            held = losses.masked_mse(states[n:], reference, mask[n:])
            retain_term = self._method.hidden_retain_weight * held
        return Terms(forget_term, retain_term, anchor_of(routing, self._anchored, [rows], n, states.device))

    def _reference(self, retain: Sequence[int], length: int) -> torch.Tensor:
        """The states of these examples before training, padded with 0 to [B, length, H]."""
        states = [self._retain_reference[index] for index in retain]
        padded = torch.zeros(len(states), length, states[0].shape[1])
        for row, kept in zip(padded, states, strict=True):
            row[: kept.shape[0]] = kept
        return padded
