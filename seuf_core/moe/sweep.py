"""Many batches through the model layer by layer, so that each layer is read once however many they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from seuf_core.data.batches import Batch
from seuf_core.moe.passes import Flow, Route, embed, ending_at, route, run_layer
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.view import MoEView

# Bytes of hidden states that are kept in memory, past which they are a file; of masks that are kept, past which they
# are made anew for every layer.
STATES_IN_MEMORY: Final = 256 << 20
MASKS_IN_MEMORY: Final = 64 << 20

Progress = Callable[[int, int], None]  # done, total
Entered = Callable[[int, int, Flow], None]


def no_progress(_done: int, _total: int) -> None:
    """Nobody listens."""


def nobody(_layer: int, _number: int, _flow: Flow) -> None:
    """Nobody listens."""


class States:
    """What flows into a layer, for many batches: on a shelf, in the CPU's memory and past `limit` bytes on disk.

    Bytes: for each batch B * S * H in the model's dtype, and what the family carries beside.

    Args:
        limit: None = STATES_IN_MEMORY. folder: see `Shelf`.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._made_of = STATES_IN_MEMORY if limit is None else limit, folder
        self._shelf = Shelf(*self._made_of)
        self._states: dict[int, int] = {}
        self._carried: dict[int, int] = {}

    def like(self) -> States:
        """An empty one with the same limit."""
        return States(*self._made_of)

    def put(self, number: int, flow: Flow) -> None:
        """Keep a copy of a batch's flow, in the place of the one before."""
        self._keep(self._states, number, flow.states)
        if flow.carried is not None:
            self._keep(self._carried, number, flow.carried)

    def get(self, number: int, device: torch.device) -> Flow:
        """A batch's flow. On the CPU it is what is kept, not a copy."""
        carried = self._carried.get(number)
        states = self._shelf[self._states[number]].to(device)
        return Flow(states, None if carried is None else self._shelf[carried].to(device))

    def _keep(self, places: dict[int, int], number: int, tensor: torch.Tensor) -> None:
        if number in places:
            self._shelf[places[number]].copy_(tensor)
        else:
            places[number] = self._shelf.put(tensor)


class Routes:
    """How the model calls its layers for each batch: kept up to a limit of bytes, past it made when asked for."""

    def __init__(self, view: MoEView, batches: Sequence[Batch]) -> None:
        self._view, self._batches = view, batches
        self._kept: dict[int, Route] = {}
        self._room = MASKS_IN_MEMORY

    def keep(self, number: int, routed: Route) -> None:
        """Keep one that was made, if there is room."""
        size = _bytes(routed)
        if size <= self._room:
            self._room -= size
            self._kept[number] = routed

    def __getitem__(self, number: int) -> Route:
        if number in self._kept:
            return self._kept[number]
        return route(self._view, self._batches[number].attention_mask.to(self._view.model.device))


def _bytes(routed: Route) -> int:
    """Of all tensors in it, shared ones once."""
    sizes: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, tuple | list):
            for part in value:
                count(part)

    for args, kwargs in routed.calls:
        count([*args, *kwargs.values()])
    return sum(sizes.values())


def embedded(
    view: MoEView, batches: Sequence[Batch], *, limit: int | None = None, folder: Path | None = None
) -> tuple[States, Routes]:
    """What flows into the first layer for each batch, and how layers are called. `limit`, `folder`: see `States`."""
    states, routes = States(limit, folder), Routes(view, batches)
    for number, batch in enumerate(batches):
        flow, routed = embed(view, batch.to(view.model.device))
        states.put(number, flow)
        routes.keep(number, routed)
    return states, routes


@torch.no_grad()
def sweep(
    view: MoEView,
    batches: Sequence[Batch],
    last: int,
    *,
    folder: Path | None = None,
    entered: Entered = nobody,
) -> Iterator[tuple[int, int]]:
    """Run every batch through layers 0 to `last`, of which only as far as its router; yields (layer, batch number)
    after each.

    What is wanted of a layer is read by hooks that the caller has in place. Each layer is loaded once.
    Memory beside embeddings and head: one layer, the hidden states of all
    batches (`States`: past STATES_IN_MEMORY on disk, in `folder`), masks up to MASKS_IN_MEMORY, and the activations
    of one batch: T tokens * (K experts * (2I + 2H) + the attention's) in the model's dtype.

    Args:
        entered: told what flows into each layer above the first: layer, batch number, flow.
    """
    states, routes = embedded(view, batches, folder=folder)
    for index in view.weights.each(range(last + 1)):
        for number in range(len(batches)):
            flow = states.get(number, view.model.device)
            if index < last:
                flow = run_layer(view, index, flow, routes[number])
                states.put(number, flow)
                entered(index + 1, number, flow)
            else:
                # Until the router has decided and every hook on it has heard.
                with ending_at(view.layer(index).router, answered=True):
                    run_layer(view, index, flow, routes[number])
            yield index, number
