"""What every objective is made of: the parts of one step's loss, the training parts they are computed on, and
the router anchor, which goes with all of them (SEUF Eq. 4: forget + lambda * retain + alpha * anchor)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from seuf_core.data.batches import Encoded, collate
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

    def halve(self, forget: Sequence[int], retain: Sequence[int]) -> bool:
        """Take half the memory for such a step; False when it takes the least already (`Forward.halve`)."""
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

    def rows(
        self, forget: Sequence[int], retain: Sequence[int], alternatives: Sequence[int] = ()
    ) -> list[Encoded]:
        """The sequences of one step: of forget, then of retain, then the alternatives."""
        parts = ((self.forget, forget), (self.retain, retain), (self.alternatives, alternatives))
        return [rows[index] for rows, indices in parts for index in indices]


def anchor_of(
    routing: Routing,
    anchored: dict[int, tuple[int, ...]],
    pieces: Sequence[Sequence[Encoded]],
    num_forget: int,
    device: torch.device,
) -> torch.Tensor:
    """Sum over target layers of the anchor on the forget sequences; 0 without a trained router.

    Args:
        routing: of all pieces, joined; pieces: the sequences of each padded batch of the pass
            (`seuf_core.moe.forward.Forward.pieces`); num_forget: how many of them, the first, are forget sequences.
    """
    total = torch.zeros((), device=device)
    if not anchored:
        return total
    masks = [collate(piece).attention_mask.bool() for piece in pieces]
    done = 0
    for mask in masks:
        mask[max(0, num_forget - done) :] = False
        done += len(mask)
    real = torch.cat([mask.flatten() for mask in masks]).to(device)
    for layer, experts in anchored.items():
        total = total + losses.anchor(routing.scores(layer), experts, real)
    return total
