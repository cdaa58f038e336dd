"""Every score by name: how much each expert serves the forget set, as a matrix [L, E].

A score is a pure function of what was measured on the data; `score_experts` measures what it needs, on two
disjoint halves of the sequences, so that how stable a score is costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from seuf_core.attribution.gradient import Derivatives, derivatives_of_sets, work_of_derivatives
from seuf_core.attribution.statistics import RoutingStatistics, statistics_of_sets, work_of_statistics
from seuf_core.data.batches import PADDING, Encoded, bucketed, collate, length_bucketed
from seuf_core.method import Attribution, Method
from seuf_core.moe.passes import Flow
from seuf_core.moe.sweep import Progress, no_progress
from seuf_core.moe.trail import Trail
from seuf_core.moe.view import MoEView

# Padded tokens that go through a layer at once, forward, and forward and backward, which keeps its activations.
TOKENS_PER_BATCH = 1024
TOKENS_PER_BACKWARD = 1024


@dataclass(frozen=True)
class Measured:
    """What the passes over the data found.

    forget, retain: routing of the sets; retain is None for a score that does not read it.
    derivatives: of the forget loss; None for a score that does not read it. seed: of the method.
    """

    forget: RoutingStatistics
    retain: RoutingStatistics | None
    derivatives: Derivatives | None
    seed: int

    def __add__(self, other: Measured) -> Measured:
        """Both halves together."""
        return Measured(
            self.forget + other.forget,
            self.retain + other.retain if self.retain and other.retain else None,
            self.derivatives + other.derivatives if self.derivatives and other.derivatives else None,
            self.seed,
        )

    @property
    def empty(self) -> bool:
        """Whether a set that was measured has no sequence."""
        sets = (self.forget, self.retain, self.derivatives)
        return any(measured.sequences == 0 for measured in sets if measured is not None)


def affinity(measured: Measured) -> torch.Tensor:
    """Eq. 2 of the paper; see `RoutingStatistics.affinity`."""
    return measured.forget.affinity


def token_share(measured: Measured) -> torch.Tensor:
    """The share of the tokens' places; see `RoutingStatistics.token_share`."""
    return measured.forget.token_share


def gate_full(measured: Measured) -> torch.Tensor:
    """The router's score whether selected or not; see `RoutingStatistics.gate_full`."""
    return measured.forget.gate_full


def contrast(measured: Measured) -> torch.Tensor:
    """Affinity on forget minus affinity on retain, fp64 [L, E]: who serves the one and not the other.

    Axis: experts of all layers compare. Invariant: antisymmetric in the two sets, 0 for equal ones.
    """
    if measured.retain is None:
        raise ValueError("contrast was not given a retain set")
    return measured.forget.affinity - measured.retain.affinity


def gradient(measured: Measured) -> torch.Tensor:
    """|sum over all of the expert's parameters of dLoss/dw * w|, fp64 [L, E], nats.

    Loss = mean over the forget sequences of the mean negative log-likelihood of their label tokens. To first order
    it is how far removing the expert moves that loss. The absolute value is taken once, over the set: an expert
    that helps one sequence as much as it harms another serves the set with neither.

    Axis: experts of all layers compare. Invariant: >= 0, and 0 for an expert that no token chose.
    """
    if measured.derivatives is None:
        raise ValueError("gradient was not given derivatives")
    return measured.derivatives.mean.abs()


def random(measured: Measured) -> torch.Tensor:
    """Seeded uniform scores in [0, 1), fp64 [L, E]. Invariant: a function of shape and seed alone."""
    generator = torch.Generator().manual_seed(measured.seed)
    return torch.rand(measured.forget.gates.shape, generator=generator, dtype=torch.float64)


class Score(NamedTuple):
    """A score, and what it reads beside the routing of the forget set."""

    compute: Callable[[Measured], torch.Tensor]
    reads_retain: bool = False
    reads_gradient: bool = False


SCORES: Final[dict[Attribution, Score]] = {
    "affinity": Score(affinity),  # SEUF, arXiv 2411.18797 Eq. 2
    "token_share": Score(token_share),  # ESFT, arXiv 2407.01906
    "gate_full": Score(gate_full),
    "contrast": Score(contrast, reads_retain=True),
    "gradient": Score(gradient, reads_gradient=True),  # arXiv 1906.10771
    "random": Score(random),
}


@dataclass(frozen=True)
class Scored:
    """Scores of all experts.

    matrix: [L, E] float64, higher serves the forget set more. forget: routing of the forget set.
    halves: the same from the even and from the odd sequences of every set; () when one of them has no sequence.
    """

    matrix: torch.Tensor
    forget: RoutingStatistics
    halves: tuple[Scored, ...] = ()


def score_experts(
    view: MoEView,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    method: Method,
    progress: Progress = no_progress,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    tokens_per_backward: int = TOKENS_PER_BACKWARD,
    scratch: Path | None = None,
    trail: Trail | None = None,
) -> Scored:
    """Score every expert by `method.attribution`.

    Each layer is read once, whatever sets and halves there are; for `gradient` twice more for each of its groups
    (`derivatives_of_sets`). Memory beside the model: `seuf_core.moe.sweep.sweep`, where a batch is
    `tokens_per_batch` padded tokens, and grows with them; for `gradient` also `derivatives_of_sets`, with
    `tokens_per_backward`.

    Args:
        view: the model, in eval mode; it is left as it was. Layers that are not held are streamed.
        forget, retain: the sequences of the sets; retain is read by `contrast` only.
        progress: called with how much is done and how much there is to do, in sequences times layers.
        tokens_per_batch, tokens_per_backward: results do not depend on them, but for rounding.
        scratch: a folder for hidden states that are too many for memory; None = the system's temporary folder.
        trail: told what flows into each layer, of every sequence that is read.
    """
    score = SCORES[method.attribution]
    read = [forget[0::2], forget[1::2]] + ([retain[0::2], retain[1::2]] if score.reads_retain else [])
    buckets = [list(bucketed(rows, lambda row: len(row.input_ids), tokens_per_batch)) for rows in read]
    sets = [[collate(bucket) for bucket in one] for one in buckets]
    numbered = [bucket for one in buckets for bucket in one]

    def entered(layer: int, number: int, flow: Flow) -> None:
        if trail is not None:
            trail.put(layer, numbered[number], flow)

    backward = [
        list(length_bucketed(rows, tokens_per_backward, PADDING)) for rows in read[:2] if score.reads_gradient
    ]
    forward_work, backward_work = work_of_statistics(view, sets), work_of_derivatives(view, backward)
    total = forward_work + backward_work
    statistics = statistics_of_sets(view, sets, lambda done, _: progress(done, total), scratch, entered)
    derivatives = derivatives_of_sets(
        view, backward, lambda done, _: progress(forward_work + done, total), scratch
    )
    halves = [
        Measured(
            statistics[half],
            statistics[2 + half] if score.reads_retain else None,
            derivatives[half] if score.reads_gradient else None,
            method.seed,
        )
        for half in (0, 1)
    ]
    whole = halves[0] + halves[1]
    return Scored(
        score.compute(whole),
        whole.forget,
        () if any(h.empty for h in halves) else tuple(Scored(score.compute(h), h.forget) for h in halves),
    )
