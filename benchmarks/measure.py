"""How things are measured here: variants in turn and their medians, the highest memory, one process each."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Final, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
T = TypeVar("T")

SAMPLE_SECONDS: Final = 0.01
# A variant that takes less is run again and again in its turn: a job runs its steps one after another too, and the
# first one after another variant's finds the processor's caches full of that.
TURN_SECONDS: Final = 0.3
# Fewer rounds than were asked for, where they would take longer than this: beside turns of ten seconds noise is small.
LEAST_ROUNDS: Final = 2
LIMIT_SECONDS: Final = 35.0


@dataclass(frozen=True)
class Variant:
    """One way to do a thing. around: what has to be so in its turn, and takes no time of its own."""

    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def interleaved(
    variants: Mapping[str, Variant], rounds: int, turn: float = TURN_SECONDS, limit: float = LIMIT_SECONDS
) -> dict[str, float]:
    """Median seconds of a call of each variant, called in turn: what else the machine does slows all of them alike.

    Each was called before, so that nothing is done for the first time here.

    Args:
        rounds: turns of each variant. turn: seconds for which a variant is called again and again in its turn.
        limit: seconds; a round that would end later does not begin, but LEAST_ROUNDS do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    began = time.monotonic()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and (time.monotonic() - began) * (number + 1) / number > limit:
            break
        for name, variant in variants.items():
            with variant.around():
                seconds[name] += _turn(variant.call, turn)
    return {name: median(all_of) for name, all_of in seconds.items()}


def _turn(call: Callable[[], object], least: float) -> list[float]:
    seconds = [timed(call)[0]]
    while sum(seconds) < least:
        seconds.append(timed(call)[0])
    return seconds


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one call, work that a GPU still has to do included, and what it returned."""
    _finish()
    began = time.perf_counter()
    result = call()
    _finish()
    return time.perf_counter() - began, result


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """The highest memory of this process inside a `with` block, in bytes.

    anonymous: what is the process's own. resident: with the pages of mapped files, which the system may drop.
    device: of a GPU's allocator; 0 without one. before: anonymous memory when the block began.
    """

    def __init__(self) -> None:
        self.anonymous = self.resident = self.device = self.before = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._sample()
        self.before = self.anonymous
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        if torch.cuda.is_available():
            self.device = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        # Linux: pages in all, resident, and resident ones that belong to files or are shared.
        _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
        page = os.sysconf("SC_PAGE_SIZE")
        self.resident = max(self.resident, resident * page)
        self.anonymous = max(self.anonymous, (resident - shared) * page)


def in_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)` in a fresh process, so that its memory is its own. It must be importable by name.

    It is forked from a server that has imported the libraries, which takes seconds, and done nothing else. What has
    looked for a GPU cannot be forked, so where there is one they are imported each time.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the best fit value = a * size^b: least squares over the logarithms."""
    slope, _ = np.polyfit(np.log(np.asarray(sizes)), np.log(np.asarray(values)), 1)
    return float(slope)


def available_bytes() -> int:
    """Memory that a process can still get without anything being swapped out (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
