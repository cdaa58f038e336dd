"""Which decoder layers have their weights in memory: all of them, or only those that are at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Weights(Protocol):
    """Loads decoder layers of a model when they are needed and drops them after.

    Embeddings, final norm and head are always there.
    """

    def loaded(self, layer: int, /) -> AbstractContextManager[None]:
        """Inside the block the layer has its weights."""
        ...

    def each(self, layers: Iterable[int]) -> Iterator[int]:
        """The layers in turn: each is loaded while it is out, and the next one is being read."""
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

    def hold(self, _layers: Iterable[int], /) -> None:
        """All of them are kept anyway."""
