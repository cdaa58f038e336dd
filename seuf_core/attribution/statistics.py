"""What the routers do with a set of sequences, summed in one pass over it: the ground of every routing score.

Letters: L sparse layers, E experts, K experts a token, T tokens, P answer positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from seuf_core.data.batches import Batch
from seuf_core.moe.routing import Routing, capture_routing
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
def routing_statistics(view: MoEView, batches: Iterable[Batch]) -> RoutingStatistics:
    """Run the model over `batches` (padding on the right) and sum what its routers decide.

    Memory beyond the model: one batch's logits, 44 bytes for each of its T * E scores of one layer, and the
    statistics themselves.
    """
    L, E, K = len(view.layers), view.num_experts, view.num_experts_per_tok
    sums, sequences = torch.zeros(L, 3, E, dtype=torch.float64), 0
    answers = [torch.zeros(0, L, K, dtype=torch.int16)]
    with capture_routing(view) as routing:
        for batch in batches:
            view.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            sums += _sequence_means(routing, view, batch)
            sequences += batch.input_ids.shape[0]
            answers.append(_answer_experts(routing, view, batch))
    gates, places, scores = sums.unbind(dim=1)
    return RoutingStatistics(gates, places, scores, sequences, torch.cat(answers), view.layer_indices)


def _sequence_means(routing: Routing, view: MoEView, batch: Batch) -> torch.Tensor:
    """[L, 3, E]: for each layer the sum over the batch's sequences of their mean g, 1[selected] / K and s."""
    mask = batch.attention_mask.double()  # [B, S]; padding never counts
    # [T]: 1/Lj on the tokens of sequence j.
    weight = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).view(-1)
    layers = []
    for layer in view.layer_indices:
        selected = routing.selected(layer) / view.num_experts_per_tok
        measured = torch.stack([routing.gates(layer), selected, routing.scores(layer)])  # [3, T, E]
        # fp64: a mean over millions of tokens keeps the digits that a near tie needs.
        layers.append(weight @ measured.double())
    return torch.stack(layers).cpu()


def _answer_experts(routing: Routing, view: MoEView, batch: Batch) -> torch.Tensor:
    predicts_answer = batch.predicts_label().view(-1)
    chosen = [routing.indices[layer][predicts_answer] for layer in view.layer_indices]
    return torch.stack(chosen, dim=1).to(torch.int16).cpu()
