"""What to do when memory runs out in a pass: let fewer tokens through at once, and run it again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from seuf_core.errors import MethodError

T = TypeVar("T")


def within_memory(work: Callable[[], T], halve: Callable[[], bool], max_tokens: int) -> T:
    """What `work()` gives; where memory runs out it is done again, with half as many tokens at once, until it fits.

    Args:
        work: gives the same however often it is begun, and however many tokens go through at once.
        halve: see `seuf_core.moe.forward.Forward.halve`.
        max_tokens: of the longest sequence, for the error.

    Raises:
        MethodError: `out_of_memory`, when not even single sequences fit.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Only here is the error gone, and with it what the frames of the failed pass held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not halve():
            raise MethodError(
                "out_of_memory",
                f"A pass over one sequence at a time, of up to {max_tokens} tokens, takes more memory than there is.",
                "Lower max_length, or run the job where there is more memory.",
                "/method/max_length",
            )


def _out_of_memory(error: Exception) -> bool:
    # The allocator of the CPU raises a plain RuntimeError; its text differs between systems after this name.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
