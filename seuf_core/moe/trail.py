"""What flowed into each decoder layer, for sequences that went through: below what is trained nothing ever changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from seuf_core.data.batches import Batch, Encoded
from seuf_core.moe.passes import Flow
from seuf_core.moe.shelf import Shelf

# Bytes of states that are kept, all of them in a mapped file: 65,000 tokens of OLMoE-1B-7B in every layer.
LIMIT: Final = 4 << 30


class Trail:
    """Keeps what flows into layers of the base model, so that no sequence goes through a frozen layer twice.

    Bytes: H numbers of the model's dtype for each token and layer, on disk up to `limit`; what comes later is not
    kept, and neither is what finds the disk full. Nothing of it is anonymous memory.

    Args:
        folder: where the file may be; see `Shelf`.
    """

    def __init__(self, limit: int = LIMIT, folder: Path | None = None) -> None:
        self._shelf, self._limit = Shelf(0, folder), limit
        # Of each sequence, by identity: itself, so that the identity stays its own, and layer -> number on the shelf.
        self._kept: dict[int, tuple[Encoded, dict[int, int]]] = {}

    def put(self, layer: int, rows: Sequence[Encoded], flow: Flow) -> None:
        """Keep what flows into a layer, for these sequences in one padded batch."""
        if flow.carried is not None:  # which belongs to its batch
            return
        for row, states in zip(rows, flow.states, strict=True):
            _, layers = self._kept.setdefault(id(row), (row, {}))
            own = states[: len(row.input_ids)]
            if layer not in layers and self._shelf.bytes_on_disk + own.nbytes <= self._limit:
                try:
                    layers[layer] = self._shelf.put(own)
                except OSError:
                    self._limit = 0

    def highest(self, row: Encoded, layer: int) -> int:
        """The highest layer up to `layer` whose input is kept of this sequence; 0, the embeddings', where none is."""
        _, layers = self._kept.get(id(row), (row, {}))
        return max((kept for kept in layers if kept <= layer), default=0)

    def flow(self, layer: int, rows: Sequence[Encoded], batch: Batch) -> Flow:
        """What flowed into a layer, all of which is kept, padded."""
        return Flow(padded([self._shelf[self._kept[id(row)][1][layer]] for row in rows], batch))


def padded(rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """[n_i, W] each, to [B, S, W] with zeros after their end, on the batch's device."""
    B, S = batch.input_ids.shape
    device = batch.input_ids.device
    if all(len(row) == S for row in rows):
        return torch.stack(list(rows)).to(device)
    filled = torch.zeros(B, S, rows[0].shape[1], dtype=rows[0].dtype)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return filled.to(device)
