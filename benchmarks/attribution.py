"""(b) Attribution: tokens a second, loading included, and peak memory; streamed against `from_pretrained` with hooks.

Each in a process of its own, in turn. The resident model tries several batch sizes and the fastest counts. Both must
score every expert alike. Of large shapes: fewer texts, fewer batch sizes, one repeat.

Figures: attribution/<shape>/<streamed|resident>/<tokens_per_second|peak_anonymous|peak_resident>, and for the
resident one /load, its seconds of loading, and /batch, the tokens of its best batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from benchmarks.cells import LARGE
from benchmarks.figures import Figures
from benchmarks.hooks import affinity
from benchmarks.measure import PeakMemory, timed
from benchmarks.setting import Setting, encoded, method_of
from benchmarks.steps import whole
from seuf_core.attribution.scores import score_experts
from seuf_core.job import load

LENGTH: Final = 256
SEQUENCES: Final = 64
LARGE_SEQUENCES: Final = 32
BATCHES: Final = (512, 2048, 8192)  # tokens
LARGE_BATCHES: Final = (512, 2048)
REPEATS: Final = 2
# Largest difference of a score, relative to the largest score: bf16 rounds hidden states to 3 digits, and where two
# experts are about even that decides which of them a token goes to.
TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Found:
    """What one process found. seconds: loading included. scores: [L][E]."""

    seconds: float
    load: float
    batch: int
    anonymous: int
    resident: int
    scores: list[list[float]]


def run(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Measure every shape that is not there yet."""
    for shape in setting.shapes:
        prefix = f"attribution/{shape}"
        if f"{prefix}/resident/tokens_per_second" in figures:
            continue
        setting.checkpoint(shape)
        ways = {"streamed": _streamed, "resident": _resident}
        found: dict[str, list[Found]] = {way: [] for way in ways}
        for _ in range(1 if shape in LARGE else min(REPEATS, setting.rounds)):
            for way, measure in ways.items():
                found[way].append(setting.apart(measure, setting, shape))
        _compare(setting, shape, found["streamed"][0], found["resident"][0])
        for way, repeats in found.items():
            tokens = _sequences(setting, shape) * _length(setting)
            seconds = median(one.seconds for one in repeats)
            figures.add(f"{prefix}/{way}/tokens_per_second", tokens / seconds, "tokens/s")
            figures.add(f"{prefix}/{way}/peak_anonymous", max(one.anonymous for one in repeats), "bytes")
            figures.add(f"{prefix}/{way}/peak_resident", max(one.resident for one in repeats), "bytes")
        figures.add(f"{prefix}/resident/load", median(one.load for one in found["resident"]), "s")
        figures.add(f"{prefix}/resident/batch", found["resident"][0].batch, "tokens")
        save()


def _sequences(setting: Setting, shape: str) -> int:
    full = LARGE_SEQUENCES if shape in LARGE else SEQUENCES
    return full if setting.size == "full" else 8


def _length(setting: Setting) -> int:
    return LENGTH if setting.size == "full" else 32


def _compare(setting: Setting, shape: str, ours: Found, theirs: Found) -> None:
    dtype = setting.dtype(shape)
    mine, other = torch.tensor(ours.scores), torch.tensor(theirs.scores)
    difference = float((mine - other).abs().max() / other.abs().max())
    assert difference < TOLERANCE[dtype], f"{shape}: scores differ by {difference}"


def _streamed(setting: Setting, shape: str) -> Found:
    rows = encoded(setting.vocabulary(shape), _sequences(setting, shape), _length(setting), seed=3)
    folder = setting.checkpoint(shape)
    with PeakMemory() as peak:
        seconds, scored = timed(lambda: score_experts(load(folder, hold=())[0], rows, [], method_of("npo")))
    return Found(seconds, 0.0, 0, peak.anonymous, peak.resident, scored.matrix.tolist())


def _resident(setting: Setting, shape: str) -> Found:
    rows = encoded(setting.vocabulary(shape), _sequences(setting, shape), _length(setting), seed=3)
    folder, batches = setting.checkpoint(shape), LARGE_BATCHES if shape in LARGE else BATCHES
    with PeakMemory() as peak:
        loading, view = timed(lambda: whole(folder))
        # Mapped weights are read at the first pass: a first batch belongs to loading.
        first, _ = timed(lambda: affinity(view, rows[:1], batches[0]))
        tried = []
        for size in batches:  # from the smallest on, so that the peak is none of a larger one
            seconds, scores = timed(lambda size=size: affinity(view, rows, size))  # type: ignore[misc]
            taken = loading + first + seconds
            tried.append(Found(taken, loading + first, size, peak.anonymous, peak.resident, scores.tolist()))
    return min(tried, key=lambda one: one.seconds)
