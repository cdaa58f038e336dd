"""Many batches through the model layer by layer, so that each layer is read once however many they are."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from seuf_core.data.batches import Batch
from seuf_core.moe.passes import Flow, Route, embed, route, run_layer
from seuf_core.moe.view import MoEView

# Bytes of hidden states that are kept in memory, past which they are a file; of masks that are kept, past which they
# are made anew for every layer.
STATES_IN_MEMORY: Final = 256 << 20
MASKS_IN_MEMORY: Final = 64 << 20

Progress = Callable[[int, int], None]  # done, total


def no_progress(_done: int, _total: int) -> None:
    """Nobody listens."""


class States:
    """What flows into a layer, for many batches: in the CPU's memory, or past `limit` bytes in a mapped file.

    Bytes: for each batch B * S * H in the model's dtype. What a family carries beside the states stays in memory.

    Args:
        shapes: [B, S, H] of each batch.
        limit: bytes. folder: of the file, which has no name there and is gone with the object; None = the system's
            temporary folder.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        limit: int = STATES_IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self._made_of = shapes, dtype, limit, folder
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        self.on_disk = total * dtype.itemsize > limit
        flat = _mapped(total, dtype, folder) if self.on_disk else torch.empty(total, dtype=dtype)
        self._states = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        self._carried: list[torch.Tensor | None] = [None] * len(shapes)

    def like(self) -> States:
        """Room for as much again."""
        return States(*self._made_of)

    def put(self, number: int, flow: Flow) -> None:
        """Keep a batch's flow; a copy of its states."""
        self._states[number].copy_(flow.states)
        self._carried[number] = None if flow.carried is None else flow.carried.cpu()

    def get(self, number: int, device: torch.device) -> Flow:
        """A batch's flow. On the CPU its states are those kept, not a copy."""
        carried = self._carried[number]
        return Flow(self._states[number].to(device), None if carried is None else carried.to(device))


def _mapped(elements: int, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    file, name = tempfile.mkstemp(prefix="seuf-states-", dir=folder)
    try:
        os.posix_fallocate(
            file, 0, elements * dtype.itemsize
        )  # a full disk says so here, not by a signal later
        return torch.from_file(name, shared=True, size=elements, dtype=dtype)
    finally:
        os.close(file)
        Path(
            name
        ).unlink()  # the mapping keeps it for as long as it lives, and a killed process leaves nothing


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
    view: MoEView, batches: Sequence[Batch], *, limit: int = STATES_IN_MEMORY, folder: Path | None = None
) -> tuple[States, Routes]:
    """What flows into the first layer for each batch, and how its layers are called."""
    shapes = [(*batch.input_ids.shape, view.model.config.hidden_size) for batch in batches]
    states, routes = States(shapes, view.model.dtype, limit, folder), Routes(view, batches)
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
) -> Iterator[tuple[int, int]]:
    """Run every batch through layers 0 to `last`, of which only as far as its router; yields (layer, batch number)
    after each.

    What is wanted of a layer is read by hooks that the caller has in place. Each layer is loaded once.
    Memory beside embeddings and head: one layer (two where the next one is read ahead), the hidden states of all
    batches (`States`: past STATES_IN_MEMORY on disk, in `folder`), masks up to MASKS_IN_MEMORY, and the activations
    of one batch: T tokens * (K experts * (2I + 2H) + the attention's) in the model's dtype.
    """
    states, routes = embedded(view, batches, folder=folder)
    for index in view.weights.each(range(last + 1)):
        for number in range(len(batches)):
            flow = states.get(number, view.model.device)
            if index < last:
                states.put(number, run_layer(view, index, flow, routes[number]))
            else:
                _run_to_router(view, index, flow, routes[number])
            yield index, number


class _ReachedError(Exception):
    """The router has decided."""


def _run_to_router(view: MoEView, index: int, flow: Flow, routed: Route) -> None:
    """A sparse layer until its router has decided and every hook on it has heard."""

    def stop(_: nn.Module, __: object, ___: object) -> None:
        raise _ReachedError

    handle = view.layer(index).router.register_forward_hook(stop)
    try:
        run_layer(view, index, flow, routed)
    except _ReachedError:
        pass
    finally:
        handle.remove()
