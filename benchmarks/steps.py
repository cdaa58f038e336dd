"""(a) Steps per second and peak memory, ours against the naive way, at an early, a middle and a late layer.

All ways take turns in one process on one model in memory, so that what else the machine does slows them alike.
Before the clock starts their first steps must give the same loss; in fp32 the trained expert must end the same.
Memory is measured in a process for each way, which opens the model as that way does and takes a few steps.

Figures: steps/<shape>/<objective>/<early|middle|late>/<freeze|train>/<texts|answers>/<ours|n1|n0|floor> in seconds a
step, .../prepare the seconds before ours' first step, .../agreement (fp32) the relative difference of the trained
expert's change, memory/<shape>/<objective>/<ours|n1|n0> in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.cells import Steps, steps_of
from benchmarks.figures import Figures
from benchmarks.floor import Products
from benchmarks.measure import PeakMemory, Variant, available_bytes, timed
from benchmarks.naive import Naive, Targets
from benchmarks.ours import Ours
from benchmarks.setting import BATCH_SIZE, Labels, Objective, Place, Setting, labels_from, method_of
from seuf_core import allocator
from seuf_core.data.batches import batch_indices
from seuf_core.job import load
from seuf_core.method import Method
from seuf_core.moe.view import MoEView, expert_parameters, moe_view
from seuf_core.unlearning.terms import Terms, TrainingData

# Relative differences between ours and naive: of the first loss, by dtype; of an expert's change, in fp32. AdamW makes
# a step of the same length of every gradient, those that are rounding noise too.
LOSS_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHANGE_TOLERANCE: Final = 0.02
# Steps before the clock starts. In bf16 N1's optimiser loses small updates, so that only the first loss is compared.
STEPS_COMPARED: Final = {torch.float32: 2, torch.bfloat16: 1}
MEMORY_STEPS: Final = 2
# Of memory that is there, what a way of doing it may plan to use: copies of the model that are in memory together.
ROOM: Final = 0.85
COPIES: Final = {"second": 2.4, "n0": 6.5}


@dataclass(frozen=True)
class Models:
    """The model that ours and N1 share, the second one that N1 looks at, and N0's own; None where there is no room."""

    view: MoEView
    reference: MoEView | None
    everything: MoEView | None


@dataclass(frozen=True)
class Cell:
    """One row's step at one place."""

    shape: str
    row: Steps
    place: Place

    @property
    def prefix(self) -> str:
        """Of its figures."""
        return f"steps/{self.shape}/{self.row.objective}/{self.place}/{self.row.router}/{self.row.labels}"


def run(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Measure every cell that is not there yet."""
    for shape in setting.shapes:
        rows = [row for row in steps_of(shape) if row.objective in setting.objectives]
        cells = [Cell(shape, row, place) for row in rows for place in row.places]
        if missing := [cell for cell in cells if f"{cell.prefix}/ours" not in figures]:
            models = _models(setting, shape, any(cell.row.n0 for cell in missing))
            for cell in missing:
                _cell(setting, figures, models, cell)
                save()
            del models
        for objective in dict.fromkeys(row.objective for row in rows):
            for way in ("ours", "n1", "n0"):
                name = f"memory/{shape}/{objective}/{way}"
                if name not in figures and _fits(setting, shape, way):
                    targets = setting.target(shape, setting.layers(shape)["middle"])
                    peak = setting.apart(_memory, setting, shape, objective, way, targets)
                    figures.add(name, peak, "bytes")
                    save()


def _models(setting: Setting, shape: str, n0: bool) -> Models:
    folder = setting.checkpoint(shape)
    return Models(
        whole(folder),
        whole(folder) if room(folder, "second") else None,
        whole(folder) if n0 and room(folder, "n0") else None,
    )


def whole(folder: Path) -> MoEView:
    """A model as everybody opens one, in a process that asks for memory as ours does: that helps both ways alike."""
    allocator.keep_freed_memory()
    transformers.logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return moe_view(model.to(device).eval().requires_grad_(False))


def room(folder: Path, way: str) -> bool:
    """Whether memory has room for the copies of the model that a way has at once (COPIES)."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_bytes()
    return COPIES[way] * size < ROOM * free


def _fits(setting: Setting, shape: str, way: str) -> bool:
    """Whether a process of this way would fit; N1 with a second model is the naive way as it is."""
    return way == "ours" or room(setting.checkpoint(shape), "second" if way == "n1" else way)


def _cell(setting: Setting, figures: Figures, models: Models, cell: Cell) -> None:
    row, shape, prefix = cell.row, cell.shape, cell.prefix
    method = method_of(row.objective, router=row.router)
    data = setting.data(shape, row.labels)
    targets = setting.target(shape, setting.layers(shape)[cell.place])
    base = _target_rows(models.view, targets)
    prepare, ours = timed(lambda: Ours(models.view, method, data, targets))
    reference = (models.reference or models.view).model
    (rate,) = method.rates(1.0)
    n1 = Naive(models.view, reference, method, data, targets, rate)
    ways: dict[str, Any] = {"ours": ours, "n1": n1}
    steps: dict[str, Callable[[int], Terms]] = {"ours": ours.step, "n1": on_batches(n1, method, data)}
    if row.n0 and models.everything:
        # At rate 0 it does all the work and stays the base, so that its loss can be checked in every cell.
        ways["n0"] = Naive(models.everything, reference, method, data, targets, 0.0, everything=True)
        steps["n0"] = on_batches(ways["n0"], method, data)
    agreement = _compared(ways, steps, method, models.view, base, targets)
    numbers = {way: count(STEPS_COMPARED[models.view.model.dtype]) for way in ways}
    variants = {way: Variant(_next(steps[way], numbers[way]), ways[way].attached) for way in ways}
    if row.objective != "rmu":  # which has no suffix
        products = _floor(models.view, max(targets), setting.length, row.labels)
        products()
        variants["floor"] = Variant(products)
        figures.add(f"{prefix}/floor_flops", products.flops, "flop")
    for way, seconds in setting.medians(variants).items():
        figures.add(f"{prefix}/{way}", seconds, "s")
    figures.add(f"{prefix}/prepare", prepare, "s")
    if agreement is not None:
        figures.add(f"{prefix}/agreement", agreement, "share")
    for rows, before in zip(_target_rows(models.view, targets, copies=False), base, strict=True):
        rows.copy_(before)


def _floor(view: MoEView, layer: int, length: int, labels: Labels) -> Products:
    sequences = 2 * BATCH_SIZE  # forget and retain
    predicted = sequences * (length - labels_from(length, labels))
    return Products(view, range(layer + 1, view.num_layers), sequences * length, predicted)


def on_batches(naive: Naive, method: Method, data: TrainingData) -> Callable[[int], Terms]:
    """A naive step on the examples that the job's loop takes for that number."""

    def step(number: int) -> Terms:
        forget = batch_indices(len(data.forget), BATCH_SIZE, method.seed, number)
        return naive.step(forget, batch_indices(len(data.retain), BATCH_SIZE, method.seed + 1, number))

    return step


def _next(step: Callable[[int], Terms], numbers: count[int]) -> Callable[[], Terms]:
    return lambda: step(next(numbers))


def _target_rows(view: MoEView, targets: Targets, copies: bool = True) -> list[torch.Tensor]:
    """What N1 moves of a model: the target experts' rows, and the routers of their layers."""
    rows: list[torch.Tensor] = []
    for index, experts in targets.items():
        layer = view.layer(index)
        for expert in experts:
            rows += expert_parameters(layer, expert).values()
        rows += [parameter.data for parameter in layer.projection.parameters(recurse=False)]
    return [row.clone() for row in rows] if copies else rows


def _compared(
    ways: dict[str, Any],
    steps: dict[str, Callable[[int], Terms]],
    method: Method,
    view: MoEView,
    base: list[torch.Tensor],
    targets: Targets,
) -> float | None:
    """Take the first steps of every way; their first losses must be one, and in fp32 the experts that come out.

    Returns in fp32 the relative difference between ours' and N1's change of the target experts.
    """
    dtype, first = view.model.dtype, {}
    for way, step in steps.items():
        with ways[way].attached():
            terms = [step(number) for number in range(STEPS_COMPARED[dtype])]
        first[way] = float(terms[0].total(method).detach())
    for way, loss in first.items():
        difference = abs(loss - first["n1"]) / abs(first["n1"])
        assert difference < LOSS_TOLERANCE[dtype], f"{way}: first loss {loss}, of N1 {first['n1']}"
    if dtype != torch.float32:
        return None
    ((index, (expert, *_)),) = targets.items()
    leaves = ways["ours"].leaves
    names = expert_parameters(view.layer(index), expert)
    mine = torch.cat([leaves[f"layers.{index}.experts.{expert}.{name}"].detach().flatten() for name in names])
    theirs = torch.cat([rows.flatten() for rows in names.values()])
    before = torch.cat([rows.flatten() for rows in base[: len(names)]])
    difference = float((mine - theirs).norm() / (theirs - before).norm())
    assert difference < CHANGE_TOLERANCE, f"changes differ by {difference}"
    return difference


def _memory(setting: Setting, shape: str, objective: Objective, way: str, targets: Targets) -> int:
    """Peak anonymous memory of a process that trains the middle layer for a few steps; on a GPU, of its memory."""
    folder, method = setting.checkpoint(shape), method_of(objective)
    data, (layer, *_) = setting.data(shape, "texts"), targets
    with PeakMemory() as peak:
        if way == "ours":
            view, _ = load(folder, hold=())
            # What a job holds while it trains with its suffix in memory (seuf_core.plan).
            view.weights.hold((layer,) if objective == "rmu" else range(layer, view.num_layers))
            ours = Ours(view, method, data, targets)
            trained: Any = ours
            step: Callable[[int], Terms] = ours.step
        else:
            view, reference = whole(folder), whole(folder)
            (rate,) = method.rates(1.0)
            trained = Naive(view, reference.model, method, data, targets, rate, everything=way == "n0")
            step = on_batches(trained, method, data)
        with trained.attached():
            for number in range(MEMORY_STEPS):
                step(number)
    return peak.device or peak.anonymous
