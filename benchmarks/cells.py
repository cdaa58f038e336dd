"""What is measured of which shape, and how often: one table, so that all of it fits into about an hour on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.setting import Labels, Objective, Place, Router

PLACES: Final[tuple[Place, ...]] = ("early", "middle", "late")


@dataclass(frozen=True)
class Steps:
    """Training steps of one kind, a cell for each place. n0: N0 takes its turn too, where memory has room for it."""

    objective: Objective
    labels: Labels = "texts"
    places: tuple[Place, ...] = PLACES
    router: Router = "freeze"
    n0: bool = False


@dataclass(frozen=True)
class Job:
    """A whole job that trains an expert of the layer at `place`.

    memory: what ours may use ("" = what is free). epochs: over `examples` of each set. ours, naive: how often each
        runs; where there is no room for the naive way it never does.
    """

    objective: Objective
    place: Place
    memory: str = ""
    epochs: int = 5
    examples: int = 24
    ours: int = 2
    naive: int = 1


# The published recipe trains the router too: one cell shows what that costs.
STEPS: Final[dict[str, tuple[Steps, ...]]] = {
    "olmoe-125m": (
        Steps("gradient_difference"),
        Steps("gradient_difference", "answers"),
        Steps("npo"),
        Steps("npo", "answers"),
    ),
    "qwen2-moe-1b": (
        Steps("rmu", n0=True),
        Steps("npo", n0=True),
        Steps("npo", "answers", n0=True),
        Steps("rmu", places=("middle",), router="train", n0=True),
    ),
    "olmoe-1b-7b": (Steps("rmu"), Steps("npo"), Steps("npo", "answers")),
}
JOBS: Final[dict[str, tuple[Job, ...]]] = {
    "olmoe-125m": (),
    "qwen2-moe-1b": (
        Job("rmu", "middle", examples=128),
        Job("npo", "middle", examples=64),
        Job("npo", "late", examples=64),
    ),
    # What a job takes when it may use little. One epoch shows memory and the plan's choice, not speed.
    "olmoe-1b-7b": (
        Job("rmu", "middle", "3GB", ours=1, naive=0),
        Job("npo", "middle", "10GB", epochs=1, examples=16, ours=1, naive=0),
        Job("npo", "middle", "4GB", epochs=1, examples=16, ours=1, naive=0),
    ),
}
LARGEST: Final = "olmoe-1b-7b"  # what is measured of it is measured of every shape without a row
# One repeat of what takes a minute there.
LARGE: Final = frozenset({"olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "qwen3-30b-a3b"})


def steps_of(shape: str) -> tuple[Steps, ...]:
    """The rows of a shape's steps."""
    return STEPS.get(shape, STEPS[LARGEST])


def jobs_of(shape: str) -> tuple[Job, ...]:
    """The jobs of a shape."""
    return JOBS.get(shape, JOBS[LARGEST])
