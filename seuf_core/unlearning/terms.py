"""What every objective is made of: the parts of one step's loss, the training parts they are computed on, and
the router anchor, which goes with all of them (SEUF Eq. 4: forget + lambda * retain + alpha * anchor)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from seuf_core.data.batches import Batch, Encoded, collate
from seuf_core.method import Method
from seuf_core.moe.routing import Routing
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
    """The training parts, tokenised. `retain` is empty when the method has no retain term.

    alternatives: of dpo, one for each entry of `forget`: the same prompt with the answer that is preferred
    (seuf_core.data.batches.encode_alternatives); empty for every other objective.
    """

    forget: list[Encoded]
    retain: list[Encoded]
    alternatives: list[Encoded] = field(default_factory=list)

    def batch(self, forget: Sequence[int], retain: Sequence[int], alternatives: Sequence[int] = ()) -> Batch:
        """One padded batch: the forget rows, then the retain rows, then the alternatives."""
        parts = ((self.forget, forget), (self.retain, retain), (self.alternatives, alternatives))
        return collate([rows[index] for rows, indices in parts for index in indices])


def anchor_of(
    routing: Routing, anchored: dict[int, tuple[int, ...]], batch: Batch, num_forget: int
) -> torch.Tensor:
    """Sum over target layers of the anchor on the forget rows (the first of the batch); 0 without a trained router."""
    total = torch.zeros((), device=batch.input_ids.device)
    real = batch.attention_mask[:num_forget].bool().flatten()
    for layer, experts in anchored.items():
        total = total + losses.anchor(routing.scores(layer)[: real.numel()], experts, real)
    return total
