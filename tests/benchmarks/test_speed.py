"""The speed benchmark runs from end to end on tiny models, and its page says what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import page, speed
from benchmarks.figures import Figures

PARTS = ("steps", "attribution", "writing", "jobs", "scaling")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    only = [word for part in PARTS for word in ("--only", part)]
    speed.main([*arguments(folder), *only])
    return folder / "results"


def arguments(folder: Path) -> list[str]:
    return [
        *("--size", "small", "--rounds", "1", "--shape", "olmoe-125m"),
        *("--out", str(folder / "results"), "--shapes", str(folder / "shapes")),
    ]


def test_every_part_has_its_figures_and_its_section(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    for part in PARTS:
        assert figures.names(f"{part}/"), part
    assert figures.environment["cpus"] > 0
    written = (out / "performance.md").read_text()
    assert written == page.text(figures)
    assert written.count("\n## ") == len(PARTS) + 1  # memory belongs to steps
    for link in re.findall(r"\]\((.*?)\)", written):
        assert (out / link).exists(), link


def test_ours_and_naive_came_to_the_same_expert(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    agreements = [figures[name] for name in figures.names("steps/") if name.endswith("/agreement")]
    assert len(agreements) == 12
    assert max(agreements) < 1e-3


def test_the_plots_are_well_formed(out: Path) -> None:
    plots = sorted(out.glob("*.svg"))
    assert [plot.stem for plot in plots] == ["performance-scaling", "performance-steps"]
    for plot in plots:
        ElementTree.parse(plot)
        assert "nan" not in plot.read_text()


def test_what_is_measured_is_not_measured_again(out: Path) -> None:
    before = Figures.read(out / "performance.json").values()
    speed.main([*arguments(out.parent), "--continue", *(word for part in PARTS for word in ("--only", part))])
    assert Figures.read(out / "performance.json").values() == before


def test_a_part_alone_leaves_the_others(out: Path) -> None:
    before = Figures.read(out / "performance.json").values()
    speed.main([*arguments(out.parent), "--only", "attribution"])
    after = Figures.read(out / "performance.json").values()
    assert after.keys() == before.keys()
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"attribution"}
