"""docs/results/performance.md and its plots say what performance.json says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.figures import Figures
from benchmarks.glance import README_SHAPE, readme_table, table
from benchmarks.prose import SECTIONS

RESULTS = Path("docs/results")
# The page of each device that was measured on.
NAMES = sorted(path.stem for path in RESULTS.glob("performance*.json"))


def test_a_page_of_this_machine_is_there() -> None:
    assert "performance" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_page_and_plots_are_made_from_the_figures(name: str) -> None:
    figures = Figures.read(RESULTS / f"{name}.json")
    assert page.stem(figures.environment) == name
    assert (RESULTS / f"{name}.md").read_text() == page.text(figures), "run: python -m benchmarks.page"
    plots = page.plots(figures)
    for section in SECTIONS:
        picture = RESULTS / f"{name}-{section}.svg"
        assert (picture.read_text() if picture.exists() else None) == plots.get(section), section


def figures() -> Figures:
    made = Figures()
    for place, seconds in (("early", 8.0), ("late", 4.0)):
        cell = f"steps/{README_SHAPE}/npo/{place}/freeze/answers"
        made.add(f"{cell}/ours", 2.0, "s")
        made.add(f"{cell}/n1", seconds, "s")
    made.add("steps/small/rmu/early/freeze/texts/ours", 0.02, "s")
    made.add("steps/small/rmu/early/freeze/texts/n1", 4.0, "s")
    made.add("steps/small/rmu/early/freeze/texts/n0", 6.0, "s")
    made.add("memory/small/rmu/ours", 9 * 10**8, "bytes")
    made.add("memory/small/rmu/n1", 4 * 10**9, "bytes")
    made.add("jobs/small/rmu/middle/free/ours/seconds", 10.0, "s")
    made.add("jobs/small/rmu/middle/free/naive/seconds", 95.0, "s")
    made.add("jobs/small/npo/middle/4GB/ours/seconds", 10.0, "s")
    made.add("jobs/small/npo/middle/4GB/ours/peak_anonymous", 3 * 10**9, "bytes")
    return made


def test_the_headlines_are_ratios_of_the_figures() -> None:
    lines = table(figures()).splitlines()[2:]
    assert lines == [
        f"| npo step on answers, {README_SHAPE}, early, late layer | 4.0x, 2.0x |  |  |  |",
        "| rmu step on running texts, small, early layer | 200x | 300x | 0.90 GB | 4.00 GB |",
        "| whole rmu job, small, middle layer | 9.5x |  |  |  |",
        "| whole npo job in 4GB, small, middle layer |  |  | 3.00 GB |  |",
    ]
    shown = readme_table(figures()).splitlines()[2:]
    assert shown == [lines[0], *lines[2:]]


def test_without_figures_there_is_no_table() -> None:
    assert table(Figures()) == ""
