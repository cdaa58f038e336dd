"""Which decoder layers have their weights in memory: all of them, or only those that are at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn


class Weights(Protocol):
    """Loads decoder layers of a model when they are needed and drops them after.

    Embeddings, final norm and head are always there.
    """

    def loaded(self, layer: int, /) -> AbstractContextManager[None]:
        """Inside the block the layer has its weights. Blocks may be nested, of the same layer too."""
        ...

    def each(self, layers: Iterable[int]) -> Iterator[int]:
        """The layers in turn: each is loaded while it is out, and the next one is being fetched."""
        ...

    def ahead(self, layer: int, /) -> None:
        """This layer is the next one that will be loaded: begin to fetch it. Any other that was begun is given up."""
        ...

    def hold(self, layers: Iterable[int], /) -> None:
        """Load these layers and keep exactly these from now on; the others are dropped."""
        ...


class Resident:
    """Of a model that is in memory as a whole."""

    def loaded(self, _layer: int, /) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def each(self, layers: Iterable[int]) -> Iterator[int]:
        """The layers as they come."""
        yield from layers

    def ahead(self, _layer: int, /) -> None:
        """Nothing to do."""

    def hold(self, _layers: Iterable[int], /) -> None:
        """All of them are kept anyway."""


Tensors = dict[str, torch.Tensor]


class Streamed:
    """Of a model on the meta device whose layers are on disk.

    The layer that was used last stays until another one is taken, or until `hold`: it is the first that a pass back
    needs. Where blocks follow one another downwards, inside what `each` went through last, the next one below is read
    ahead as well: so a backward pass that computes its layers anew is never without its next.
    Memory: what is held or inside a block, or the one used last. Reading ahead is into the page cache, which the kernel
    gives back when it must; with `prefetch` it is into memory, and one layer more. A dropped layer leaves nothing
    behind, and forgets what was done to its weights. For one thread at a time; `prefetch` has another one.

    Args:
        layers: the decoder layers, whose parameters and persistent buffers are on the meta device.
        read: all of these of one layer, by their names in it.
        announce: told which layer will be read next.
        prefetch: whether that one is read at once, by another thread.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        read: Callable[[int], Tensors],
        announce: Callable[[int], None] = lambda _: None,
        *,
        prefetch: bool = False,
    ) -> None:
        self._layers, self._read, self._announce, self._prefetch = list(layers), read, announce, prefetch
        self._empty = [layer.state_dict(keep_vars=True) for layer in self._layers]
        self._users: Counter[int] = Counter()
        self._held: set[int] = set()
        self._idle: int | None = None  # has its weights, and no user
        self._next: tuple[int, Future[Tensors]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._walked: frozenset[int] = frozenset()
        self._last, self._walking = -1, False

    @contextmanager
    def loaded(self, layer: int, /) -> Iterator[None]:
        """See `Weights.loaded`."""
        downwards, self._last = layer == self._last - 1, layer
        self._take(layer)
        try:
            if downwards and not self._walking and layer - 1 in self._walked:
                self.ahead(layer - 1)
            yield
        finally:
            self._leave(layer)

    def each(self, layers: Iterable[int]) -> Iterator[int]:
        """See `Weights.each`."""
        order = list(layers)
        self._walked, self._walking = frozenset(order), True
        try:
            for place, layer in enumerate(order):
                with self.loaded(layer):
                    if place + 1 < len(order):
                        self.ahead(order[place + 1])
                    yield layer
        finally:
            self._walking = False
            self._give_up()

    def ahead(self, layer: int, /) -> None:
        """See `Weights.ahead`."""
        here = self._users[layer] or layer == self._idle or (self._next and self._next[0] == layer)
        if here:
            return
        if not self._prefetch:
            self._announce(layer)
        else:
            self._give_up()
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="seuf-read-ahead")
            self._next = layer, self._reader.submit(self._read, layer)

    def hold(self, layers: Iterable[int], /) -> None:
        """See `Weights.hold`."""
        wanted = set(layers)
        for layer in sorted(self._held - wanted):
            self._held.remove(layer)
            self._leave(layer)
        for layer in sorted(wanted - self._held):
            self._take(layer)
            self._held.add(layer)
        self._drop_idle()
        self._give_up()

    def _take(self, layer: int) -> None:
        if layer == self._idle:
            self._idle = None
        else:
            self._drop_idle()
            if not self._users[layer]:
                self._fill(layer)
        self._users[layer] += 1

    def _leave(self, layer: int) -> None:
        self._users[layer] -= 1
        if not self._users[layer]:
            self._drop_idle()
            self._idle = layer

    def _drop_idle(self) -> None:
        if self._idle is not None:
            for name, empty in self._empty[self._idle].items():
                _put(self._layers[self._idle], name, empty)
            self._idle = None

    def _fill(self, layer: int) -> None:
        if self._next and self._next[0] == layer:
            (_, reading), self._next = self._next, None
            tensors = reading.result()
        else:
            self._give_up()
            tensors = self._read(layer)
        for name in list(tensors):
            _put(self._layers[layer], name, tensors.pop(name))

    def _give_up(self) -> None:
        """Drop what was read ahead; a read that has begun is waited for, so that never two run at once."""
        if self._next is not None:
            (_, reading), self._next = self._next, None
            if not reading.cancel():
                reading.exception()


def _put(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Let a parameter or buffer of the layer be this tensor; whether it wants a gradient stays as it is."""
    path, _, own = name.rpartition(".")
    module = layer.get_submodule(path)
    before = getattr(module, own)
    if own in module._parameters:
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(before.requires_grad)
        else:
            tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
    setattr(module, own, tensor)
