"""How sequences go through the model: from wherever nothing is trained below, and no further than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, TypeVarTuple

import torch
from torch.utils.checkpoint import checkpoint

from seuf_core.data.batches import Batch, Encoded, collate
from seuf_core.moe.parts import run_layer_at
from seuf_core.moe.passes import Flow, Route, embed, run_layer
from seuf_core.moe.view import MoEView

_Given = TypeVarTuple("_Given")
_Found = TypeVar("_Found")

# Padded tokens that go through a layer at once where nothing is trained.
TOKENS_PER_LOOK: Final = 4096


@dataclass(frozen=True)
class Answers:
    """What comes out of the last decoder layer where a label token is predicted, and nowhere else.

    states: [P, H] in the model's dtype; target: [P] the label token ids; row: [P] which sequence of the pass,
    ascending; num_sequences: B. `seuf_core.moe.passes.tail` makes logits of states.
    """

    states: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    num_sequences: int


class Beginning(Protocol):
    """The part of the forward pass that comes first, as far as it is not computed anew.

    next_layer: the decoder layer to go on with.
    """

    next_layer: int

    def begin(self, rows: Sequence[Encoded], batch: Batch) -> tuple[Flow, Route]:
        """What flows into that layer, for these sequences and the padded batch they make."""
        ...

    def at_labels(self, rows: Sequence[Encoded], device: torch.device) -> torch.Tensor:
        """The flow where a label token is predicted only, [P, H], on the model's device."""
        batch = collate(rows).to(device)
        return self.begin(rows, batch)[0].states[batch.predicts_label()]


class FromTokens(Beginning):
    """Nothing is known before: the pass begins with the embeddings."""

    next_layer = 0

    def __init__(self, view: MoEView) -> None:
        self._view = view

    def begin(self, _rows: Sequence[Encoded], batch: Batch) -> tuple[Flow, Route]:
        """Embeddings of the batch."""
        return embed(self._view, batch)


class Forward:
    """Sequences through the model as it stands, with what is attached to it.

    Args:
        beginning: where a pass starts.
        tokens: padded tokens that go through at once. A pass of more runs in pieces; any loss over all of them
            stays what it is. Where gradients are on, every layer is then run once more in the backward pass
            (torch.utils.checkpoint): what is kept is H numbers a token and layer, and the activations of one piece
            in one layer. Results do not depend on it.
        recompute: the same with a single piece, so that no layer's weights have to stay in memory for the backward
            pass.
    """

    def __init__(
        self,
        view: MoEView,
        beginning: Beginning | None = None,
        *,
        tokens: int | None = None,
        recompute: bool = False,
    ) -> None:
        self.view = view
        self._beginning = beginning or FromTokens(view)
        self._tokens, self._recompute = tokens, recompute

    def answers(self, rows: Sequence[Encoded], heard: Collection[int] = ()) -> Answers:
        """The whole model up to its tail, over the sequences `rows`.

        Args:
            heard: decoder layers whose router somebody listens to: it decides on every token. In the last layer that
                is run it else does so only where a label token is predicted.
        """
        states, labels = self._run(rows, self.view.num_layers, heard)
        return Answers(states, labels.target, labels.row, len(rows))

    def states(
        self, rows: Sequence[Encoded], layer: int, heard: Collection[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of decoder layer `layer` where a label token is predicted: [P, H], and [P] which sequence.

        Nothing above that layer is run. `heard`: see `answers`.
        """
        states, labels = self._run(rows, layer + 1, heard)
        return states, labels.row

    def halve(self, rows: Sequence[Encoded]) -> bool:
        """Let half as many tokens through at once; False when a pass over `rows` is one sequence at a time."""
        pieces = self.pieces(rows)
        if len(pieces) == len(rows):
            return False
        self._tokens = max(len(piece) * max(map(_length, piece)) for piece in pieces) // 2
        return True

    def _run(
        self, rows: Sequence[Encoded], stop: int, heard: Collection[int]
    ) -> tuple[torch.Tensor, _Labels]:
        """Flow into decoder layer `stop` where a label token is predicted, [P, H].

        Layer by layer over all pieces, so that one that is not in memory is read once.
        """
        device, pieces = self.view.model.device, self.pieces(rows)
        once_more = torch.is_grad_enabled() and (self._recompute or len(pieces) > 1)
        if self._beginning.next_layer == stop:
            states = [self._beginning.at_labels(piece, device) for piece in pieces]
            return torch.cat(states), _labels(rows, device)
        batches = [collate(piece).to(device) for piece in pieces]
        begin, layer = _once_more(self._beginning.begin, once_more), _once_more(_layer, once_more)
        last = _once_more(_heard_layer if stop - 1 in heard else _last_layer, once_more)
        begun = [begin(*some) for some in zip(pieces, batches, strict=True)]
        flows = [flow for flow, _ in begun]
        states = []
        for index in self.view.weights.each(range(self._beginning.next_layer, stop)):
            for at, (_, routed) in enumerate(begun):
                if index + 1 < stop:
                    flows[at] = layer(self.view, index, flows[at], routed)
                else:
                    labels = batches[at].predicts_label()
                    states.append(last(self.view, index, flows[at], routed, labels))
        return torch.cat(states), _labels(rows, device)

    def pieces(self, rows: Sequence[Encoded]) -> list[list[Encoded]]:
        """The rows in their order, in the padded batches that a pass runs: at most `tokens` padded tokens together."""
        pieces: list[list[Encoded]] = []
        for row in rows:
            longest = max(map(_length, [*pieces[-1], row])) if pieces else 0
            if pieces and (self._tokens is None or (len(pieces[-1]) + 1) * longest <= self._tokens):
                pieces[-1].append(row)
            else:
                pieces.append([row])
        return pieces


def _layer(view: MoEView, index: int, flow: Flow, routed: Route) -> Flow:
    """A layer that is loaded once more where it is run once more."""
    with view.weights.loaded(index):
        return run_layer(view, index, flow, routed)


def _last_layer(view: MoEView, index: int, flow: Flow, routed: Route, at: torch.Tensor) -> torch.Tensor:
    with view.weights.loaded(index):
        return run_layer_at(view, index, flow, routed, at)


def _heard_layer(view: MoEView, index: int, flow: Flow, routed: Route, at: torch.Tensor) -> torch.Tensor:
    return _layer(view, index, flow, routed).states[at]


def _once_more(function: Callable[[*_Given], _Found], wanted: bool) -> Callable[[*_Given], _Found]:
    """The same; where `wanted`, it keeps what it is given instead of its activations, and runs again backward."""
    if not wanted:
        return function

    def run(*given: *_Given) -> _Found:
        found: _Found = checkpoint(function, *given, use_reentrant=False)
        return found

    return run


@dataclass(frozen=True)
class _Labels:
    target: torch.Tensor
    row: torch.Tensor


def _labels(rows: Sequence[Encoded], device: torch.device) -> _Labels:
    """Label tokens of all sequences in order, and which sequence each belongs to."""
    counts = torch.tensor([len(row.input_ids) - row.labels_from for row in rows])
    target = [token for row in rows for token in row.input_ids[row.labels_from :]]
    row = torch.arange(len(rows)).repeat_interleave(counts)
    return _Labels(torch.tensor(target, dtype=torch.int64).to(device), row.to(device))


def _length(row: Encoded) -> int:
    return len(row.input_ids)
