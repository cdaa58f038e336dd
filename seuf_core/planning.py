"""A job's own plan: made when its texts are tokens, made anew when its targets are known, and obeyed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from seuf_core.data.batches import Encoded
from seuf_core.evaluate.probes import sequences_of
from seuf_core.job import Job
from seuf_core.plan.calibrate import accelerators, calibrate
from seuf_core.plan.facts import Calibration, JobTokens, Machine, ModelShape, TokenCounts, model_shape
from seuf_core.plan.machine import choose_device, machine
from seuf_core.plan.planner import Plan, make_plan
from seuf_core.plan.setting import Targets


@dataclass(frozen=True)
class Place:
    """What a job may use, looked at before it takes any of it."""

    shape: ModelShape
    machine: Machine

    @classmethod
    def of(cls, model: Path, memory: int | str | None) -> Place:
        """For a model folder.

        Args:
            memory: what the job may use; None = SEUF_MEMORY, else what is free.
        """
        return cls(model_shape(model), machine(memory, accelerators()))

    @property
    def device(self) -> str:
        """Where the model is to be opened; every plan of the job names the same."""
        return choose_device(self.shape, self.machine).name


@dataclass(frozen=True)
class Planning:
    """What every plan of one job is made from."""

    shape: ModelShape
    tokens: JobTokens
    machine: Machine
    calibration: Calibration

    @classmethod
    def of(cls, job: Job, place: Place, work: Path) -> Planning:
        """Count and calibrate; see seuf_core.plan.calibrate.calibrate for what that costs.

        Args:
            job: opened without layers, on the device of `place`.
        """
        calibration = calibrate(job.view, place.shape, work)
        return cls(place.shape, tokens_of(job), place.machine, calibration)

    def before(self, job: Job) -> tuple[Job, Plan]:
        """The plan while nobody knows what will be trained, and the job with its weights kept accordingly."""
        plan = make_plan(self.shape, self.tokens, job.method, self.machine, calibration=self.calibration)
        job = _obeying(job, plan)
        job.view.weights.hold(range(job.view.num_layers) if plan.residency == "whole" else ())
        return job, plan

    def for_targets(self, job: Job, targets: Mapping[int, tuple[int, ...]]) -> tuple[Job, Plan]:
        """The plan for these experts, and the job that obeys it. What is in memory as a whole stays so."""
        if not targets:
            return self.before(job)
        plan = make_plan(
            self.shape,
            self.tokens,
            job.method,
            self.machine,
            calibration=self.calibration,
            targets=Targets(tuple(sorted(targets)), sum(map(len, targets.values()))),
            among=("whole",) if job.residency == "whole" else ("suffix", "streamed"),
        )
        return _obeying(job, plan), plan

    def obeyed(self, job: Job, targets: Mapping[int, tuple[int, ...]]) -> Job:
        """The job that obeys `for_targets`."""
        return self.for_targets(job, targets)[0]


def _obeying(job: Job, plan: Plan) -> Job:
    return replace(job, residency=plan.residency, micro_batch_tokens=plan.micro_batch_tokens)


def tokens_of(job: Job) -> JobTokens:
    """The job's sets as they were tokenised."""
    data = job.data
    return JobTokens(
        _counted(data.forget),
        _counted(data.retain),
        _counted(data.alternatives),
        _counted(sequences_of(job.selection_probes)),
        _counted(sequences_of(job.test_probes)),
    )


def _counted(rows: Iterable[Encoded]) -> TokenCounts:
    return TokenCounts.of((len(row.input_ids), len(row.input_ids) - row.labels_from) for row in rows)


def device_peak() -> int:
    """The most that was allocated on any accelerator since this was last asked; for Recorder."""
    peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    return max(peaks, default=0)
