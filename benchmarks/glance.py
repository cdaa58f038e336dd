"""The headline figures: how many times as fast as the ordinary way, and how much memory it takes.

The performance page has all rows; the README those that concern a model of true size, and the whole jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks.figures import Figures, markdown_table
from benchmarks.units import size, times

COLUMNS: Final = ("", "times as fast", "times as fast as N0", "memory", "memory otherwise")
WORDS: Final = {"texts": "running texts", "answers": "answers"}
README_SHAPE: Final = "olmoe-1b-7b"


@dataclass(frozen=True)
class Row:
    """One line. part: the first word of its figures' names. memory: ours and otherwise, in bytes."""

    part: str
    shape: str
    what: str
    faster: str
    than_n0: str = ""
    memory: tuple[float | None, float | None] = (None, None)

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table has them."""
        return (self.what, self.faster, self.than_n0, *map(size, self.memory))


def table(figures: Figures) -> str:
    """Every headline; empty where nothing was measured."""
    return _table(rows(figures))


def readme_table(figures: Figures) -> str:
    """Those of the README."""
    return _table(row for row in rows(figures) if row.part == "jobs" or row.shape == README_SHAPE)


def _table(chosen: Iterable[Row]) -> str:
    lines = [row.cells for row in chosen]
    return markdown_table(COLUMNS, lines) if lines else ""


def rows(figures: Figures) -> Iterator[Row]:
    """Steps, whole jobs, attribution, writing."""
    yield from _steps(figures)
    yield from _jobs(figures)
    yield from _attribution(figures)
    yield from _writing(figures)


def _steps(figures: Figures) -> Iterator[Row]:
    """The cells of one kind at all places in one row."""
    kinds: dict[tuple[str, ...], dict[str, str]] = {}
    for name in figures.names("steps/"):
        _, shape, objective, place, router, labels, what = name.split("/")
        if what == "ours" and router == "freeze":
            kinds.setdefault((shape, objective, labels), {})[place] = name.removesuffix("/ours")
    for (shape, objective, labels), cells in kinds.items():
        over = {
            way: [_ratio(figures, f"{cell}/{way}", f"{cell}/ours") for cell in cells.values()]
            for way in ("n1", "n0")
        }
        ours, n1 = (figures.get(f"memory/{shape}/{objective}/{way}") for way in ("ours", "n1"))
        yield Row(
            "steps",
            shape,
            f"{objective} step on {WORDS[labels]}, {shape}, {', '.join(cells)} layer",
            ", ".join(filter(None, over["n1"])),
            ", ".join(filter(None, over["n0"])),
            (ours, n1) if labels == "texts" else (None, None),
        )


def _jobs(figures: Figures) -> Iterator[Row]:
    for job in _measured(figures, "jobs/", "/ours/seconds"):
        _, shape, objective, place, memory = job.split("/")
        limited = "" if memory == "free" else f" in {memory}"
        yield Row(
            "jobs",
            shape,
            f"whole {objective} job{limited}, {shape}, {place} layer",
            _ratio(figures, f"{job}/naive/seconds", f"{job}/ours/seconds"),
            memory=_peaks(figures, job, "ours", "naive"),
        )


def _attribution(figures: Figures) -> Iterator[Row]:
    rate = "tokens_per_second"
    for prefix in _measured(figures, "attribution/", f"/streamed/{rate}"):
        shape = prefix.split("/")[1]
        yield Row(
            "attribution",
            shape,
            f"attribution, {shape}",
            _ratio(figures, f"{prefix}/streamed/{rate}", f"{prefix}/resident/{rate}"),
            memory=_peaks(figures, prefix, "streamed", "resident"),
        )


def _writing(figures: Figures) -> Iterator[Row]:
    for name in figures.names("writing/"):
        _, shape, way, what = name.split("/")
        if way in ("first", "again") and what == "seconds":
            first = "first" if way == "first" else "next"
            prefix = f"writing/{shape}"
            yield Row(
                "writing",
                shape,
                f"writing, {shape}, {first} checkpoint of a base",
                _ratio(figures, f"{prefix}/save_pretrained/seconds", name),
                memory=(
                    figures.get(f"{prefix}/{way}/anonymous"),
                    figures.get(f"{prefix}/save_pretrained/anonymous"),
                ),
            )


def _measured(figures: Figures, start: str, ending: str) -> Iterator[str]:
    """What stands before `ending` in the figures that have it."""
    return (name.removesuffix(ending) for name in figures.names(start) if name.endswith(ending))


def _peaks(figures: Figures, prefix: str, ours: str, otherwise: str) -> tuple[float | None, float | None]:
    return figures.get(f"{prefix}/{ours}/peak_anonymous"), figures.get(f"{prefix}/{otherwise}/peak_anonymous")


def _ratio(figures: Figures, above: str, below: str) -> str:
    value = figures.get(above)
    return "" if value is None else times(value / figures[below])
