"""Random token sequences of unlike lengths, two label tokens each, for tests of what reads batches."""

from __future__ import annotations

import torch

from seuf_core.data.batches import Encoded

LENGTHS = (3, 9, 5, 7, 12, 4)


def sequences(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    """One sequence a length, of tokens of tests.tiny's vocabulary that are not special; same seed, same tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [Encoded(torch.randint(3, 259, (n,), generator=generator).tolist(), n - 2, False) for n in lengths]
