"""From a method to the loss of one step: forget term + lambda * retain term + alpha * anchor (SEUF Eq. 4).

Forget and retain examples go through the model together in one padded batch, forget rows first. What the
objective needs of the model before training (reference likelihoods, hidden states) is computed once, here,
so that no second model ever exists in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from seuf_core.data.batches import Batch, Encoded, collate
from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.moe.forward import answer_logits, layer_states
from seuf_core.moe.routing import Routing, capture_routing
from seuf_core.moe.view import MoEView
from seuf_core.unlearning import losses


@dataclass(frozen=True)
class Terms:
    """The parts of one step's loss, before weighting; each a scalar with a graph."""

    forget: torch.Tensor
    retain: torch.Tensor
    anchor: torch.Tensor
    retain_weight: float | None = None  # lambda, of an objective that finds its own

    def total(self, method: Method) -> torch.Tensor:
        """forget + lambda * retain + alpha * anchor."""
        weight = method.retain_weight if self.retain_weight is None else self.retain_weight
        return self.forget + weight * self.retain + method.anchor_weight * self.anchor


class Objective(Protocol):
    """The loss of one step on the given examples of the training parts."""

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms: ...

    def state(self) -> dict[str, torch.Tensor]:
        """What the objective learns while it trains, for the training checkpoint; of most, nothing."""
        ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`; an empty one is the beginning."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """The training parts, tokenised. `retain` is empty when the method has no retain term."""

    forget: list[Encoded]
    retain: list[Encoded]

    def batch(self, forget: Sequence[int], retain: Sequence[int]) -> Batch:
        """One padded batch, forget rows first."""
        rows = [self.forget[i] for i in forget] + [self.retain[i] for i in retain]
        return collate(rows)


# Forget terms over likelihoods: (l [B], tokens [B], l_ref [B], method) -> scalar.
ForgetTerm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Method], torch.Tensor]
LIKELIHOOD_TERMS: Final[dict[str, ForgetTerm]] = {
    # SEUF, arXiv 2411.18797
    "gradient_ascent": lambda nll, tokens, _, __: losses.gradient_ascent(nll, tokens),
    # arXiv 2203.12817
    "gradient_difference": lambda nll, tokens, _, __: losses.gradient_ascent(nll, tokens),
    # arXiv 2404.05868
    "npo": lambda nll, _, reference, method: losses.npo(nll, reference, method.npo_beta),
}
# Those that look at l_ref; the others are spared a pass over the forget set.
USES_REFERENCE: Final[frozenset[str]] = frozenset({"npo"})


def build_objective(
    view: MoEView, method: Method, data: TrainingData, targets: dict[int, tuple[int, ...]]
) -> Objective:
    """The objective of a method, with its references computed from the model as it is now."""
    anchored = targets if method.trains_router else {}
    if method.objective in HIDDEN_STATE_OBJECTIVES:
        return HiddenStateObjective(view, method, data, targets, anchored)
    return LikelihoodObjective(view, method, data, anchored)


class _Stateless:
    """The state of an objective that learns nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        pass


class LikelihoodObjective(_Stateless):
    """gradient_ascent, gradient_difference, npo: the forget term is a function of l and l_ref."""

    def __init__(
        self, view: MoEView, method: Method, data: TrainingData, anchored: dict[int, tuple[int, ...]]
    ) -> None:
        self._view, self._method, self._data, self._anchored = view, method, data, anchored
        self._term = LIKELIHOOD_TERMS[method.objective]
        self._reference = (
            _reference_nll(view, data, method.batch_size)
            if method.objective in USES_REFERENCE
            else torch.zeros(len(data.forget), device=view.model.device)
        )

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        batch, n = self._data.batch(forget, retain).to(self._view.model.device), len(forget)
        with capture_routing(self._view, tuple(self._anchored)) as routing:
            nll, tokens = _likelihood(self._view, batch)
        forget_term = self._term(nll[:n], tokens[:n], self._reference[list(forget)], self._method)
        retain_term = losses.cross_entropy(nll[n:], tokens[n:]) if retain else nll.new_zeros(())
        return Terms(forget_term, retain_term, _anchor(routing, self._anchored, batch, n))


def _likelihood(view: MoEView, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """l [B] and the number of label tokens [B] of each sequence."""
    answers = answer_logits(view.model, batch)
    return losses.sequence_nll(answers.logits, answers.target, answers.row, answers.num_sequences)


@torch.no_grad()
def _reference_nll(view: MoEView, data: TrainingData, batch_size: int) -> torch.Tensor:
    """l of every forget example under the model before training, fp32 [N]; 4 N bytes."""
    parts = []
    for start in range(0, len(data.forget), batch_size):
        batch = collate(data.forget[start : start + batch_size]).to(view.model.device)
        parts.append(_likelihood(view, batch)[0])
    return torch.cat(parts)


class HiddenStateObjective(_Stateless):
    """rmu and adaptive_rmu: push the output of one decoder layer to c * u on forget, hold it on retain.

    The layer is the highest target layer; nothing above it is run. Only positions that predict a label token
    count. Memory of the retain reference: 4 * H bytes a real token of the retain training part.
    """

    def __init__(
        self,
        view: MoEView,
        method: Method,
        data: TrainingData,
        targets: dict[int, tuple[int, ...]],
        anchored: dict[int, tuple[int, ...]],
    ) -> None:
        self._view, self._method, self._data, self._anchored = view, method, data, anchored
        self._layer = max(targets)
        self._retain_reference = [states for states, _ in self._states(data.retain)]
        coefficient = method.rmu_coefficient
        if method.objective == "adaptive_rmu" or coefficient == "auto":
            norms = torch.cat([states[mask].norm(dim=-1) for states, mask in self._states(data.forget)])
            coefficient = method.adaptive_rmu_scale * float(norms.mean())
        hidden_size = view.model.config.hidden_size
        self._goal = coefficient * losses.control_vector(hidden_size, method.seed).to(view.model.device)

    @torch.no_grad()
    def _states(self, encoded: list[Encoded]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per example: states [S_i, H] fp32 under the model before training, and which of them predict a label."""
        found = []
        for start in range(0, len(encoded), self._method.batch_size):
            rows = encoded[start : start + self._method.batch_size]
            batch = collate(rows).to(self._view.model.device)
            states, mask = layer_states(self._view.model, self._layer, batch).float(), batch.predicts_label()
            # Copies: a view would keep the padding of its whole batch alive.
            found += [
                (states[i, : len(r.input_ids)].clone(), mask[i, : len(r.input_ids)]) for i, r in enumerate(rows)
            ]
        return found

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        batch, n = self._data.batch(forget, retain).to(self._view.model.device), len(forget)
        with capture_routing(self._view, tuple(self._anchored)) as routing:
            states = layer_states(self._view.model, self._layer, batch)
        mask = batch.predicts_label()
        forget_term = losses.masked_mse(states[:n], self._goal, mask[:n])
        retain_term = states.new_zeros((), dtype=torch.float32)
        if retain:
            reference = torch.zeros_like(states[n:], dtype=torch.float32)
            for row, index in enumerate(retain):
                kept = self._retain_reference[index]
                reference[row, : kept.shape[0]] = kept
            retain_term = self._method.hidden_retain_weight * losses.masked_mse(
                states[n:], reference, mask[n:]
            )
        return Terms(forget_term, retain_term, _anchor(routing, self._anchored, batch, n))


def _anchor(
    routing: Routing, anchored: dict[int, tuple[int, ...]], batch: Batch, num_forget: int
) -> torch.Tensor:
    """Sum over target layers of the anchor on the forget rows; 0 without a trained router."""
    total = torch.zeros((), device=batch.input_ids.device)
    real = batch.attention_mask[:num_forget].bool().flatten()
    for layer, experts in anchored.items():
        total = total + losses.anchor(routing.scores(layer)[: real.numel()], experts, real)
    return total
