"""From a method to the loss of one step: forget term + lambda * retain term + alpha * anchor (SEUF Eq. 4).

Forget and retain examples go through the model together. What an objective needs of the
model before training (reference likelihoods, states, logits) is computed once, when it is built, and kept
on the CPU, so that no second model ever exists in memory.
"""

from __future__ import annotations

from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.moe.forward import Forward
from seuf_core.unlearning.hidden import HiddenStateObjective
from seuf_core.unlearning.likelihood import LikelihoodObjective
from seuf_core.unlearning.terms import Objective, Terms, TrainingData

__all__ = ["Objective", "Terms", "TrainingData", "build_objective"]


def build_objective(
    forward: Forward, method: Method, data: TrainingData, targets: dict[int, tuple[int, ...]]
) -> Objective:
    """The objective of a method, with its references computed from the model as it is now.

    Args:
        forward: how the examples go through the model, now and at every step.
        targets: decoder layer -> target experts; {} for a scope that has none.

    Raises:
        MethodError: no_such_layer or layer_below_targets (rmu_layer), alternatives_required (dpo),
            retain_set_required (pdu).
    """
    anchored = targets if method.trains_router else {}
    if method.objective in HIDDEN_STATE_OBJECTIVES:
        return HiddenStateObjective(forward, method, data, targets, anchored)
    return LikelihoodObjective(forward, method, data, anchored)
