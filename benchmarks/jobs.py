"""(d) The whole job on prompts with answers, attribution and writing included: seuf_core.unlearn against the naive way.

Each in a process of its own, in turn, from files to files. Ours does what every job does besides: it looks at a small
evaluation set before and after, measures its test part, verifies what it wrote and writes a delta; all of that is in
its time, and the base is one whose digests nobody remembers. The naive way loads the model twice, attributes with
hooks at one batch size, trains N1 and calls `save_pretrained`. Both train the same expert: the router of one layer is
surer than the others, so that the highest affinity is there. Which jobs, how long and how often: benchmarks.cells.JOBS.
Of shapes too large for two copies in memory only ours is measured, with little memory.

Figures: jobs/<shape>/<objective>/<place>/<free|3GB ...>/<ours|naive>/<seconds|peak_anonymous>, .../ours/<phase> in
seconds, .../<steps|layer>, and .../residency/<whole|suffix|streamed> for the one that the plan chose.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from transformers import AutoTokenizer

from benchmarks.cells import Job, jobs_of
from benchmarks.figures import Figures
from benchmarks.hooks import affinity
from benchmarks.measure import PeakMemory, timed
from benchmarks.naive import Naive
from benchmarks.setting import (
    BATCH_SIZE,
    SMALL_EXAMPLES,
    Setting,
    method_of,
    texts,
    write_probes,
    write_texts,
)
from benchmarks.steps import on_batches, room, whole
from benchmarks.writing import digests_in
from seuf_core import unlearn
from seuf_core.data.batches import encode_examples
from seuf_core.inputs import Inputs, read_inputs
from seuf_core.method import Method
from seuf_core.observer import Silent
from seuf_core.unlearning.terms import TrainingData

# Two experts that are even are even: bf16 may decide between them.
CHOICE: Final = 0.98
ATTRIBUTION_TOKENS: Final = 2048  # of a batch of the naive attribution


@dataclass(frozen=True)
class JobFiles:
    """What a job is given."""

    model: Path
    forget: Path
    retain: Path
    evaluation: Path


@dataclass(frozen=True)
class Done:
    """What one process took. target: decoder layer and expert; residency: what ours' plan chose."""

    seconds: float
    peak: int
    target: tuple[int, int]
    phases: dict[str, float] = field(default_factory=dict)
    residency: str = ""


def run(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Measure every job that is not there yet."""
    for shape in setting.shapes:
        for job in jobs_of(shape):
            prefix = f"jobs/{shape}/{job.objective}/{job.place}/{job.memory or 'free'}"
            if f"{prefix}/ours/seconds" in figures:
                continue
            with tempfile.TemporaryDirectory(dir=setting.folder) as work:
                _measure(setting, figures, prefix, job, _files(setting, shape, job, Path(work)))
            save()


def _measure(setting: Setting, figures: Figures, prefix: str, job: Job, files: JobFiles) -> None:
    method, out = _method(files, job), files.forget.parent / "out"
    repeats, naive = min(job.ours, setting.rounds), job.naive if room(files.model, "second") else 0
    ours: list[Done] = []
    theirs: list[Done] = []
    for number in range(max(repeats, naive)):
        if number < repeats:
            ours.append(setting.apart(_ours, files, method, out, job.memory))
            shutil.rmtree(out)
        if number < naive:
            theirs.append(setting.apart(_naive, files, method, out, ours[0].target))
            shutil.rmtree(out)
    for way, done in (("ours", ours), ("naive", theirs)):
        if done:
            figures.add(f"{prefix}/{way}/seconds", median(one.seconds for one in done), "s")
            figures.add(f"{prefix}/{way}/peak_anonymous", max(one.peak for one in done), "bytes")
    for phase in ours[0].phases:
        figures.add(f"{prefix}/ours/{phase}", median(one.phases[phase] for one in ours), "s")
    figures.add(f"{prefix}/steps", method.steps, "steps")
    figures.add(f"{prefix}/layer", ours[0].target[0], "layer")
    figures.add(f"{prefix}/residency/{ours[0].residency}", 1, "chosen")


def _files(setting: Setting, shape: str, job: Job, work: Path) -> JobFiles:
    model = setting.checkpoint(shape, sharp_layer=setting.layers(shape)[job.place])
    number = job.examples if setting.size == "full" else SMALL_EXAMPLES
    vocabulary = setting.vocabulary(shape)
    forget, retain = (
        write_texts(work / f"{side}.jsonl", texts(vocabulary, number, setting.length, seed), "answers")
        for side, seed in (("forget", 1), ("retain", 2))
    )
    return JobFiles(model, forget, retain, write_probes(work / "evaluation.jsonl", vocabulary))


def _method(files: JobFiles, job: Job) -> Method:
    train = _inputs(files, method_of(job.objective)).forget.train
    return method_of(job.objective, steps=math.ceil(job.epochs * len(train) / BATCH_SIZE))


def _inputs(files: JobFiles, method: Method) -> Inputs:
    return read_inputs(files.model, files.forget, files.retain, files.evaluation, method, Silent())


def _ours(files: JobFiles, method: Method, out: Path, memory: str) -> Done:
    with (
        tempfile.TemporaryDirectory(dir=out.parent) as work,
        digests_in(Path(work) / "digests", empty=True),
        PeakMemory() as peak,
    ):
        seconds, result = timed(
            lambda: unlearn(
                files.model,
                files.forget,
                out,
                retain=files.retain,
                evaluation=files.evaluation,
                method=method,
                work=Path(work),
                memory=memory or None,
            )
        )
    (target,) = result.selection
    assert result.plan is not None
    return Done(
        seconds,
        peak.device or peak.anonymous,
        (target["layer"], target["expert"]),
        result.seconds,
        result.plan["residency"],
    )


def _naive(files: JobFiles, method: Method, out: Path, target: tuple[int, int]) -> Done:
    with PeakMemory() as peak:
        seconds, _ = timed(lambda: _naive_job(files, method, out, target))
    return Done(seconds, peak.device or peak.anonymous, target)


def _naive_job(files: JobFiles, method: Method, out: Path, target: tuple[int, int]) -> None:
    inputs, tokenizer = _inputs(files, method), AutoTokenizer.from_pretrained(files.model)
    assert inputs.retain is not None
    forget, retain = (
        encode_examples(tokenizer, part.train, method.max_length) for part in (inputs.forget, inputs.retain)
    )
    view, reference = whole(files.model), whole(files.model)
    scores = affinity(view, forget, ATTRIBUTION_TOKENS)
    layer, expert = target
    score, best = float(scores[view.layer_indices.index(layer), expert]), float(scores.max())
    assert score > CHOICE * best, f"ours chose an expert of affinity {score}, the best has {best}"
    (rate,) = method.rates(1.0)
    data = TrainingData(forget, retain)
    naive = Naive(view, reference.model, method, data, {layer: (expert,)}, rate)
    step = on_batches(naive, method, data)
    with naive.attached():
        for number in range(method.steps):
            step(number)
    view.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
