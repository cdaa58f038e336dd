"""What the routers do with a set of sequences, summed in one pass over it: the ground of every routing score.

Letters: L sparse layers, E experts, K experts a token, T tokens, P answer positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seuf_core.data.batches import Batch
from seuf_core.moe.routing import Routing, capture_routing
from seuf_core.moe.sweep import Entered, Progress, no_progress, nobody, sweep
from seuf_core.moe.view import MoEView


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing of a set, summed; nothing in it grows with the data but `answer_experts`.

    For a token, s is the router's own score of an expert before top-K (softmax or sigmoid, as the family has it)
    and g is s where the model really selected the expert, else 0.

    gates, places, scores: [L, E] float64, the sum over sequences of the sequence's mean over its real tokens of
        g, of 1[selected] / K, and of s.
    sequences: how many there are.
    answer_experts: [P, L, K] int16, the experts chosen where an answer token is predicted; 2 * P * L * K bytes.
    layers: decoder layer index of each row.
    """

    gates: torch.Tensor
    places: torch.Tensor
    scores: torch.Tensor
    sequences: int
    answer_experts: torch.Tensor
    layers: tuple[int, ...]

    @property
    def affinity(self) -> torch.Tensor:
        """Eq. 2 of arXiv 2411.18797: mean over sequences of (mean over tokens of g), fp64 [L, E].

        Axis: each row is one layer. Invariant: a row sums to the mean mass of the selected experts: at most 1 for
        softmax routers, at most K for sigmoid ones.
        """
        return self.gates / max(1, self.sequences)

    @property
    def token_share(self) -> torch.Tensor:
        """ESFT's token selection ratio (arXiv 2407.01906), fp64 [L, E]: mean over sequences of (1/Lj) times the sum
        over the sequence's Lj tokens of 1[selected] / K.

        Axis: each row is one layer. Invariant: every row sums to 1, as every token fills K places of every layer
        (ESFT's released script normalises over the wrong axis: its rows do not).
        """
        return self.places / max(1, self.sequences)

    @property
    def gate_full(self) -> torch.Tensor:
        """Mean over sequences of (mean over tokens of s), whether selected or not, fp64 [L, E].

        Axis: each row is one layer. Invariant: a row of a softmax router sums to 1; nowhere below `affinity`.
        """
        return self.scores / max(1, self.sequences)

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Statistics of both sets together; the answer positions of `self` come first."""
        return RoutingStatistics(
            self.gates + other.gates,
            self.places + other.places,
            self.scores + other.scores,
            self.sequences + other.sequences,
            torch.cat([self.answer_experts, other.answer_experts]),
            self.layers,
        )


@torch.no_grad()
def statistics_of_sets(
    view: MoEView,
    sets: Sequence[Sequence[Batch]],
    progress: Progress = no_progress,
    scratch: Path | None = None,
    entered: Entered = nobody,
) -> list[RoutingStatistics]:
    """What the routers do with each set, all of them in one pass over the layers.

    Nothing above the last router is run. Memory beside the model: that of `seuf_core.moe.sweep.sweep`, and the
    statistics themselves.

    Args:
        progress: hears of every layer that a batch went through; done and all to do, in sequences times layers.
        scratch: a folder for hidden states that are too many for memory; None = the system's temporary folder.
        entered: see `seuf_core.moe.sweep.sweep`; batches count through all sets.
    """
    L, E, K = len(view.layers), view.num_experts, view.num_experts_per_tok
    batches = [batch for batches in sets for batch in batches]
    of = [number for number, batches in enumerate(sets) for _ in batches]
    sums = torch.zeros(len(sets), L, 3, E, dtype=torch.float64)
    answers = [torch.zeros(int(batch.predicts_label().sum()), L, K, dtype=torch.int16) for batch in batches]
    row = {index: number for number, index in enumerate(view.layer_indices)}
    last, done = max(view.layer_indices, default=-1), 0
    total = work_of_statistics(view, sets)
    with capture_routing(view) as routing:
        for layer, number in sweep(view, batches, last, folder=scratch, entered=entered):
            batch = batches[number]
            if layer in row:
                sums[of[number], row[layer]] += _sequence_means(routing, view, layer, batch)
                answers[number][:, row[layer]] = _answer_experts(routing, layer, batch)
            done += len(batch.input_ids)
            progress(done, total)
    found = []
    for number, one in enumerate(sets):
        gates, places, scores = sums[number].unbind(dim=1)
        mine = [answers[i] for i, owner in enumerate(of) if owner == number]
        chosen = torch.cat([torch.zeros(0, L, K, dtype=torch.int16), *mine])
        sequences = sum(len(batch.input_ids) for batch in one)
        found.append(RoutingStatistics(gates, places, scores, sequences, chosen, view.layer_indices))
    return found


def work_of_statistics(view: MoEView, sets: Sequence[Sequence[Batch]]) -> int:
    """How often a sequence goes through a layer in `statistics_of_sets`."""
    sequences = sum(len(batch.input_ids) for batches in sets for batch in batches)
    return (max(view.layer_indices, default=-1) + 1) * sequences


def _sequence_means(routing: Routing, view: MoEView, layer: int, batch: Batch) -> torch.Tensor:
    """[3, E]: the sum over the batch's sequences of their mean g, 1[selected] / K and s."""
    mask = batch.attention_mask.double()  # [B, S]; padding never counts
    # [T]: 1/Lj on the tokens of sequence j.
    weight = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).view(-1)
    selected = routing.selected(layer) / view.num_experts_per_tok
    measured = torch.stack([routing.gates(layer), selected, routing.scores(layer)])  # [3, T, E]
    # fp64: a mean over millions of tokens keeps the digits that a near tie needs.
    return (weight.to(measured.device) @ measured.double()).cpu()


def _answer_experts(routing: Routing, layer: int, batch: Batch) -> torch.Tensor:
    """[P, K], the experts chosen where a label token is predicted."""
    chosen = routing.indices[layer]
    return chosen[batch.predicts_label().view(-1).to(chosen.device)].to(torch.int16).cpu()
