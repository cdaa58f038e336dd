"""(e) Time and memory of a step, of attribution and of writing against layers, experts, examples and sequence length.

One size at a time is doubled, all else stays; each point is a process of its own and all points take turns. Through
the medians goes a power of the size, whose exponent is held against what the arithmetic says.

Figures: scaling/<axis>/<what>/<size>/<seconds|bytes>; bytes are what the process grew by.
scaling/<axis>/<what>/<seconds|bytes>_exponent, ..._arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks.figures import Figures
from benchmarks.measure import PeakMemory, Variant, exponent, timed
from benchmarks.ours import Ours
from benchmarks.setting import LENGTH, Objective, Setting, Targets, encoded, method_of, training_data
from benchmarks.shapes import SHAPES
from seuf_core.attribution.scores import score_experts
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.reader import TORCH_DTYPES
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.families import family_of
from seuf_core.job import load

SHAPE: Final = "olmoe-125m"
REPEATS: Final = 3


@dataclass(frozen=True)
class Point:
    """One model and one data set."""

    layers: int
    experts: int
    examples: int
    length: int


BASE: Final = {"full": Point(4, 32, 32, LENGTH), "small": Point(4, 8, 8, 16)}
AXES: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "full": {
        "layers": (4, 8, 16),
        "experts": (16, 32, 64),
        "examples": (32, 64, 128),
        "length": (32, 64, 128),
    },
    "small": {"layers": (2, 4), "experts": (4, 8), "examples": (8, 16), "length": (8, 16)},
}
# Exponents by the arithmetic: (seconds, bytes) for each axis in turn; None is not measured, "flops" is fitted to the
# operations, in which attention grows with the square of the length.
Exponent = float | str
ARITHMETIC: Final[dict[str, dict[str, tuple[Exponent, Exponent] | None]]] = {
    # One expert, whatever the depth; the constants of every example; the layer that holds the expert.
    "rmu_step": {"layers": (0, 0), "experts": (0, 1), "examples": (0, 1), "length": (1, 1)},
    # The suffix above layer 0 is all but one layer. A token sees K experts, however many there are.
    "npo_step": {"layers": (1, 1), "experts": (0, 1), "examples": (0, 1), "length": ("flops", 1)},
    # Every expert is read once; two layers and every example's states are in memory.
    "attribution": {"layers": (1, 0), "experts": (1, 1), "examples": (1, 1), "length": ("flops", 1)},
    # At most the bytes of one shard, through a small buffer.
    "writing": {"layers": (1, 0), "experts": (1, 0), "examples": None, "length": None},
}


def run(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Measure every axis that is not there yet."""
    for axis, sizes in AXES[setting.size].items():
        for what, expected in ARITHMETIC.items():
            if expected[axis] is None or f"scaling/{axis}/{what}/seconds_exponent" in figures:
                continue
            _axis(setting, figures, axis, sizes, what)
            save()


def _axis(setting: Setting, figures: Figures, axis: str, sizes: tuple[int, ...], what: str) -> None:
    points = {size: replace(BASE[setting.size], **{axis: size}) for size in sizes}
    found: dict[int, list[tuple[float, int]]] = {size: [] for size in sizes}
    for point in points.values():
        _checkpoint(setting, point)
    for _ in range(min(REPEATS, setting.rounds)):
        for size, point in points.items():
            found[size].append(setting.apart(MEASURES[what], setting, point, _target(setting, what, point)))
    for place, unit in enumerate(("seconds", "bytes")):
        values = [max(1e-9, median(one[place] for one in found[size])) for size in sizes]
        prefix = f"scaling/{axis}/{what}"
        for size, value in zip(sizes, values, strict=True):
            figures.add(f"{prefix}/{size}/{unit}", value, "s" if unit == "seconds" else unit)
        figures.add(f"{prefix}/{unit}_exponent", exponent(sizes, values), "exponent")
        expected = ARITHMETIC[what][axis]
        assert expected is not None
        said = expected[place]
        if said == "flops":
            said = exponent(sizes, [_flops(point) for point in points.values()])
        figures.add(f"{prefix}/{unit}_arithmetic", float(said), "exponent")


def _flops(point: Point) -> float:
    """Of all tokens in one layer: two a weight a token sees, and attention's two products with every other token."""
    fields = SHAPES[SHAPE].fields
    hidden, inside, chosen = (
        fields[name] for name in ("hidden_size", "intermediate_size", "num_experts_per_tok")
    )
    weights = 4 * hidden**2 + 3 * chosen * hidden * inside + point.experts * hidden
    return float(point.length * (2 * weights + 4 * hidden * point.length))


def _checkpoint(setting: Setting, point: Point) -> Path:
    return setting.checkpoint(SHAPE, num_hidden_layers=point.layers, num_experts=point.experts)


def _target(setting: Setting, what: str, point: Point) -> Targets:
    """For RMU in the last layer but one: if depth cost anything, there it would. For NPO in the first: the longest
    suffix there is."""
    return setting.target(SHAPE, 0 if what == "npo_step" else point.layers - 2, _checkpoint(setting, point))


def _step(setting: Setting, point: Point, objective: Objective, targets: Targets) -> tuple[float, int]:
    data = training_data(setting.vocabulary(SHAPE), point.examples, point.length)
    folder, method, (layer, *_) = _checkpoint(setting, point), method_of(objective), targets
    with PeakMemory() as peak:
        view, _ = load(folder, hold=())
        view.weights.hold((layer,) if objective == "rmu" else range(layer, view.num_layers))
        ours, numbers = Ours(view, method, data, targets), count()
        with ours.attached():
            ours.step(next(numbers))
            seconds = setting.medians({"step": Variant(lambda: ours.step(next(numbers)))})["step"]
    return seconds, peak.anonymous - peak.before


def _rmu_step(setting: Setting, point: Point, targets: Targets) -> tuple[float, int]:
    return _step(setting, point, "rmu", targets)


def _npo_step(setting: Setting, point: Point, targets: Targets) -> tuple[float, int]:
    return _step(setting, point, "npo", targets)


def _attribution(setting: Setting, point: Point, _targets: Targets) -> tuple[float, int]:
    rows = encoded(setting.vocabulary(SHAPE), point.examples, point.length, seed=3)
    folder, method = _checkpoint(setting, point), method_of("npo")
    with PeakMemory() as peak:
        seconds, _ = timed(lambda: score_experts(load(folder, hold=())[0], rows, [], method))
    return seconds, peak.anonymous - peak.before


def _writing(setting: Setting, point: Point, targets: Targets) -> tuple[float, int]:
    folder = _checkpoint(setting, point)
    ((layer, (expert,)),) = targets.items()
    index, names = read_index(folder), family_of("olmoe").expert_names(layer, expert)
    changed: dict[str, torch.Tensor] = {}
    for name in (name for parts in names.values() for name in parts):
        record = index.record(name)
        assert record is not None
        changed[name] = torch.zeros(record.shape, dtype=TORCH_DTYPES[record.dtype])
    with tempfile.TemporaryDirectory(dir=setting.folder) as out, PeakMemory() as peak:
        seconds, _ = timed(lambda: write_checkpoint(folder, Path(out) / "written", changed, "benchmark"))
    return seconds, peak.anonymous - peak.before


MEASURES: Final[dict[str, Any]] = {
    "rmu_step": _rmu_step,
    "npo_step": _npo_step,
    "attribution": _attribution,
    "writing": _writing,
}
