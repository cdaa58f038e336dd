"""What stays the same while a job trains, computed once: the pass up to the lowest layer that is trained.

Everything below that layer is frozen, so what flows into it is a constant of each sequence. In the layer itself
attention and shared experts see only constants too, and where the router is frozen every token that goes to no
target expert leaves it as it did before. So a step runs that layer on the tokens that a target sees, with its
attention and its frozen experts looked up, and then only what lies above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from seuf_core.data.batches import Batch, Encoded, bucketed, collate
from seuf_core.moe.forward import Beginning
from seuf_core.moe.passes import Flow, Route, embed, route, run_layer
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.start_layer import StartLayer, Watched
from seuf_core.moe.sweep import Routes, States
from seuf_core.moe.trail import Trail, padded
from seuf_core.moe.view import MoEView

# Padded tokens that go through one layer at once while constants are computed.
TOKENS_PER_PASS = 2048


class Constants(Protocol):
    """What is kept of sequences, filled by `keep_all`."""

    layer: int  # that the kept flows go into

    def keep(self, rows: Sequence[Encoded], flow: Flow, routed: Route) -> None:
        """Take what flows into the layer, for these sequences in one padded batch; the layer is loaded."""
        ...


@torch.no_grad()
def keep_all(
    view: MoEView,
    wanted: Sequence[tuple[Constants, Sequence[Encoded]]],
    *,
    tokens: int = TOKENS_PER_PASS,
    folder: Path | None = None,
    trail: Trail | None = None,
) -> None:
    """Run all sequences up to a decoder layer and keep what each of `wanted`, which share it, keeps of its own.

    One layer after the other runs over all batches, so that each is read once. Memory: one
    layer, what flows into it (`seuf_core.moe.sweep.States`: past a limit on disk, in `folder`), and the
    activations of `tokens` tokens.

    Args:
        trail: where each sequence begins, and what it is told of them.
    """
    (layer,) = {constants.layer for constants, _ in wanted}
    trail = Trail(limit=0) if trail is None else trail
    parts = [
        (constants, start, part)
        for constants, rows in wanted
        for start, some in _by_start(trail, rows, layer).items()
        for part in bucketed(some, lambda row: len(row.input_ids), tokens)
    ]
    states, routes = _begun(view, trail, [(start, part) for _, start, part in parts], folder)
    for index in view.weights.each(range(min((start for _, start, _ in parts), default=layer), layer + 1)):
        for number, (constants, start, part) in enumerate(parts):
            if index < start:
                continue
            flow = states.get(number, view.model.device)
            if index == layer:
                constants.keep(part, flow, routes[number])
            else:
                flow = run_layer(view, index, flow, routes[number])
                states.put(number, flow)
                trail.put(index + 1, part, flow)


def _by_start(trail: Trail, rows: Sequence[Encoded], layer: int) -> dict[int, list[Encoded]]:
    """The sequences by the layer that they begin with."""
    found: dict[int, list[Encoded]] = {}
    for row in rows:
        found.setdefault(trail.highest(row, layer), []).append(row)
    return found


def _begun(
    view: MoEView, trail: Trail, parts: Sequence[tuple[int, Sequence[Encoded]]], folder: Path | None
) -> tuple[States, Routes]:
    """What flows into the layer that each of these batches begins with, and how layers are called."""
    batches = [collate(part) for _, part in parts]
    states, routes = States(folder=folder), Routes(view, batches)
    for number, ((start, part), batch) in enumerate(zip(parts, batches, strict=True)):
        if start:
            states.put(number, trail.flow(start, part, batch))
        else:
            flow, routed = embed(view, batch.to(view.model.device))
            states.put(number, flow)
            routes.keep(number, routed)
    return states, routes


class FromStates(Beginning):
    """A pass that begins at a decoder layer with what flowed into it: 2 * H bytes a token of a bf16 model.

    The layer itself runs as the model has it, whatever was changed in it or is forbidden there.
    """

    def __init__(self, view: MoEView, layer: int, shelf: Shelf) -> None:
        self.layer = self.next_layer = layer
        self._view, self._shelf = view, shelf
        self._kept: dict[int, int] = {}

    def keep(self, rows: Sequence[Encoded], flow: Flow, _routed: Route) -> None:
        """See `Constants.keep`."""
        for row, states in zip(rows, flow.states, strict=True):
            self._kept[id(row)] = self._shelf.put(states[: len(row.input_ids)])

    def begin(self, rows: Sequence[Encoded], batch: Batch) -> tuple[Flow, Route]:
        """What flowed into the layer, padded."""
        states = padded([self._shelf[self._kept[id(row)]] for row in rows], batch)
        return Flow(states), route(self._view, batch.attention_mask)


@dataclass(frozen=True)
class _Moving:
    """One sequence of n tokens, m of which a target sees. Numbers on the shelf:

    out: [n, H], what left the layer before the training. entry: [m, H], what flowed in. parts: what the layer's
    constant parts said there. frozen: [m, H], what its frozen experts said together.
    tokens: [m], where they are, ascending. labels: which of these m predict a label token.
    """

    out: int
    entry: int
    parts: tuple[int, ...]
    frozen: int
    tokens: torch.Tensor
    labels: slice


class FrozenRouter(Beginning):
    """A pass that begins above the lowest target layer, whose router is frozen.

    Which tokens a target sees is a constant then, and all others leave the layer as they did before: only the former
    are run, those of all sequences packed together. Memory of a bf16 model: 2 * H bytes a token, and for each that a
    target sees 4 * H and twice the widths of what attention and shared experts say.
    """

    def __init__(self, view: MoEView, targets: Mapping[int, tuple[int, ...]], shelf: Shelf) -> None:
        self.layer = min(targets)
        self.next_layer = self.layer + 1
        self._view, self._run, self._shelf = view, StartLayer(view, self.layer), shelf
        self._targets = torch.tensor(targets[self.layer])
        self._kept: dict[int, _Moving] = {}

    def keep(self, rows: Sequence[Encoded], flow: Flow, routed: Route) -> None:
        """See `Constants.keep`."""
        watched = self._run.watch(flow, routed)
        aimed = torch.isin(watched.index, self._targets.to(watched.index.device))
        for at, row in enumerate(rows):
            first = at * flow.states.shape[1]
            here = slice(first, first + len(row.input_ids))
            tokens = torch.where(aimed[here].any(dim=1))[0]
            self._kept[id(row)] = self._keep(watched, here, tokens, aimed, row)

    def _keep(
        self, watched: Watched, here: slice, tokens: torch.Tensor, aimed: torch.Tensor, row: Encoded
    ) -> _Moving:
        put, at = self._shelf.put, here.start + tokens
        weights = watched.weights[at].masked_fill(aimed[at], 0)
        frozen = self._run.run_frozen(watched.states[at], watched.index[at], weights)
        parts = tuple(put(part[at]) for part in watched.parts)
        where = tokens.cpu()
        ends = torch.tensor([row.labels_from - 1, len(row.input_ids) - 1])
        labels = slice(*torch.searchsorted(where, ends).tolist())
        return _Moving(put(watched.out[here]), put(watched.entry[at]), parts, put(frozen), where, labels)

    def begin(self, rows: Sequence[Encoded], batch: Batch) -> tuple[Flow, Route]:
        """Output of the target layer, padded."""
        kept = [self._kept[id(row)] for row in rows]
        out = padded([self._shelf[one.out] for one in kept], batch)
        width = batch.input_ids.shape[1]
        at = torch.cat([row * width + one.tokens for row, one in enumerate(kept)])
        moved = self._moved(kept, [slice(None)] * len(kept), out.device)
        states = out.flatten(0, 1).index_copy(0, at.to(out.device), moved)
        return Flow(states.view_as(out)), route(self._view, batch.attention_mask)

    def at_labels(self, rows: Sequence[Encoded], device: torch.device) -> torch.Tensor:
        """Output of the target layer where a label token is predicted; no other token is run."""
        kept = [self._kept[id(row)] for row in rows]
        out, at, before = [], [], 0
        for row, one in zip(rows, kept, strict=True):
            first, end = row.labels_from - 1, len(row.input_ids) - 1
            out.append(self._shelf[one.out][first:end])
            at.append(one.tokens[one.labels] + (before - first))
            before += end - first
        moved = self._moved(kept, [one.labels for one in kept], device)
        return torch.cat(out).to(device).index_copy(0, torch.cat(at).to(device), moved)

    def _moved(
        self, kept: Sequence[_Moving], which: Sequence[slice], device: torch.device
    ) -> torch.Tensor:
        """The layer's output, [M, H], of these of the tokens that a target sees."""

        def gather(numbers: Sequence[int]) -> torch.Tensor:
            pieces = [self._shelf[number][some] for number, some in zip(numbers, which, strict=True)]
            return torch.cat(pieces).to(device)

        entry = gather([one.entry for one in kept])
        parts = [gather(numbers) for numbers in zip(*(one.parts for one in kept), strict=True)]
        frozen = gather([one.frozen for one in kept])
        with self._run.saying([part[None] for part in parts]), self._run.experts_by(lambda *_: frozen):
            return self._run(entry[None])[0]


@dataclass(frozen=True)
class _Looked:
    """One sequence of n tokens. Numbers on the shelf:

    entry: [n, H], what flowed into the layer. parts: what its constant parts said. experts: [n, K], those the base
    model sends the tokens to. outputs: [n, K, H], what they say.
    """

    entry: int
    parts: tuple[int, ...]
    experts: int
    outputs: int


class TrainedRouter(Beginning):
    """A pass that begins above the lowest target layer, whose router is trained.

    Every token may be sent elsewhere, so all of them go through the layer; of a frozen expert's answer to a token only
    its weight changes. The answers of the experts that the base model asks are kept; where a token is sent to another,
    that one is asked: exact however far the router drifts. What is asked later is not kept: its rounding depends on
    the tokens beside it, so a run that was resumed would remember other answers than one that was not. Memory of a
    bf16 model: 2 * (1 + K) * H bytes a token and twice the widths of what attention and shared experts say.
    """

    def __init__(self, view: MoEView, targets: Mapping[int, tuple[int, ...]], shelf: Shelf) -> None:
        self.layer = min(targets)
        self.next_layer = self.layer + 1
        self._view, self._run, self._shelf = view, StartLayer(view, self.layer), shelf
        self._targets = torch.tensor(targets[self.layer])
        self._kept: dict[int, _Looked] = {}

    def keep(self, rows: Sequence[Encoded], flow: Flow, routed: Route) -> None:
        """See `Constants.keep`."""
        put = self._shelf.put
        watched = self._run.watch(flow, routed)
        for at, row in enumerate(rows):
            first = at * flow.states.shape[1]
            here = slice(first, first + len(row.input_ids))
            states, index = watched.states[here], watched.index[here]
            answers = self._ask(states.repeat_interleave(index.shape[1], dim=0), index.flatten())
            self._kept[id(row)] = _Looked(
                put(watched.entry[here]),
                tuple(put(said[here]) for said in watched.parts),
                put(index),
                put(answers.view(*index.shape, -1)),
            )

    def _ask(self, states: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What expert experts[i] says to states[i], [N, H], without its weight."""
        return self._run.run_frozen(states, experts[:, None], states.new_ones(len(states), 1))

    def begin(self, rows: Sequence[Encoded], batch: Batch) -> tuple[Flow, Route]:
        """Output of the target layer, padded."""
        kept, routed = [self._kept[id(row)] for row in rows], route(self._view, batch.attention_mask)
        parts = [
            padded([self._shelf[number] for number in numbers], batch)
            for numbers in zip(*(one.parts for one in kept), strict=True)
        ]
        entry = padded([self._shelf[one.entry] for one in kept], batch)
        real = torch.where(batch.attention_mask.flatten())[0]

        def look_up(states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            outputs = self._outputs(kept, states[real], index[real])
            said = torch.bmm(weights[real][:, None].to(outputs.dtype), outputs)[:, 0]
            return torch.zeros_like(states).index_copy(0, real, said)

        with self._run.saying(parts), self._run.experts_by(look_up):
            return Flow(self._run(entry)), routed

    @torch.no_grad()
    def _outputs(self, kept: Sequence[_Looked], states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What expert index[t, k] says to token t, [R, K, H], without its weight; in the place of a target, anything.

        states: [R, H], index: [R, K], of all real tokens in the order of `kept`.
        """
        device = states.device
        experts = torch.cat([self._shelf[one.experts] for one in kept]).to(device)
        outputs = torch.cat([self._shelf[one.outputs] for one in kept]).to(device)
        if torch.equal(experts, index):
            return outputs
        found = experts[:, :, None] == index[:, None, :]  # [R, kept, K]
        R, K, width = outputs.shape
        where = found.int().argmax(dim=1) + K * torch.arange(R, device=device)[:, None]
        outputs = outputs.view(R * K, width)[where.flatten()].view(R, K, width)
        token, slot = torch.where(~found.any(dim=1) & ~torch.isin(index, self._targets.to(device)))
        if token.numel():
            outputs[token, slot] = self._ask(states[token], index[token, slot])
        return outputs
