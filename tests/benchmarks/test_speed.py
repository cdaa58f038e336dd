"""The speed benchmark runs from end to end on tiny models, and its page says what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import cells, page, speed
from benchmarks.figures import Figures
from benchmarks.setting import BATCH_SIZE, SMALL_EXAMPLES, Setting

PARTS = ("steps", "attribution", "writing", "jobs", "scaling")
SHAPES = ("olmoe-125m", "qwen2-moe-1b")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    speed.main([*arguments(folder), *only(*PARTS)])
    return folder / "results"


def arguments(folder: Path) -> list[str]:
    return [
        *("--size", "small", "--rounds", "1", *(word for shape in SHAPES for word in ("--shape", shape))),
        *("--out", str(folder / "results"), "--shapes", str(folder / "shapes")),
    ]


def only(*parts: str) -> list[str]:
    return [word for part in parts for word in ("--only", part)]


def test_every_part_has_its_figures_and_its_section(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    for part in PARTS:
        assert figures.names(f"{part}/"), part
    assert figures.environment["cpus"] > 0
    written = (out / "performance.md").read_text()
    assert written == page.text(figures)
    assert written.count("\n## ") == len(PARTS) + 2  # memory belongs to steps; all begins with a glance
    for link in re.findall(r"\]\((.*?)\)", written):
        assert (out / link).exists(), link


def test_every_cell_of_the_table_was_measured(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    for shape in SHAPES:
        for row in cells.STEPS[shape]:
            for place in row.places:
                cell = f"steps/{shape}/{row.objective}/{place}/{row.router}/{row.labels}"
                ways = {name.removeprefix(f"{cell}/") for name in figures.names(cell)}
                wanted = {"ours", "n1", "prepare"}
                wanted |= {"n0"} if row.n0 else set()
                wanted |= {"floor", "floor_flops"} if row.objective != "rmu" else set()
                wanted |= {"agreement"} if shape == "olmoe-125m" else set()  # in fp32
                assert ways == wanted, cell
        for job in cells.JOBS[shape]:
            prefix = f"jobs/{shape}/{job.objective}/{job.place}/free"
            assert figures[f"{prefix}/ours/seconds"] > 0
            assert figures[f"{prefix}/naive/seconds"] > 0
            assert len(figures.names(f"{prefix}/residency/")) == 1
            assert figures[f"{prefix}/layer"] == Setting(out, size="small").layers(shape)[job.place]


def test_ours_and_naive_came_to_the_same_expert(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    agreements = [figures[name] for name in figures.names("steps/") if name.endswith("/agreement")]
    assert len(agreements) == 12
    assert max(agreements) < 1e-3


def test_half_of_a_text_is_prompt_so_the_head_and_the_last_experts_do_half(out: Path) -> None:
    figures = Figures.read(out / "performance.json")
    cell = "steps/olmoe-125m/npo/middle/freeze"
    assert figures[f"{cell}/answers/floor_flops"] < figures[f"{cell}/texts/floor_flops"]


def test_the_plots_are_well_formed(out: Path) -> None:
    plots = sorted(out.glob("*.svg"))
    assert [plot.stem for plot in plots] == ["performance-scaling", "performance-steps"]
    for plot in plots:
        ElementTree.parse(plot)
        assert "nan" not in plot.read_text()


def test_what_is_measured_is_not_measured_again(out: Path) -> None:
    before = Figures.read(out / "performance.json").values()
    speed.main([*arguments(out.parent), "--continue", *only(*PARTS)])
    assert Figures.read(out / "performance.json").values() == before


def test_a_part_alone_leaves_the_others(out: Path) -> None:
    before = Figures.read(out / "performance.json").values()
    speed.main([*arguments(out.parent), "--only", "attribution"])
    after = Figures.read(out / "performance.json").values()
    assert after.keys() == before.keys()
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"attribution"}


def test_a_job_that_may_use_little_says_what_it_kept_in_memory(tmp_path: Path) -> None:
    small = ["--size", "small", "--rounds", "1", "--shape", "olmoe-1b-7b", "--only", "jobs"]
    speed.main([*small, "--out", str(tmp_path / "results"), "--shapes", str(tmp_path / "shapes")])
    figures = Figures.read(tmp_path / "results" / "performance.json")
    for job in cells.JOBS["olmoe-1b-7b"]:
        prefix = f"jobs/olmoe-1b-7b/{job.objective}/{job.place}/{job.memory}"
        assert figures[f"{prefix}/ours/peak_anonymous"] > 0
        assert figures.names(f"{prefix}/residency/") == [f"{prefix}/residency/whole"]  # it fits
        assert f"{prefix}/naive/seconds" not in figures
        assert figures[f"{prefix}/steps"] == job.epochs * SMALL_EXAMPLES / BATCH_SIZE
    written = (tmp_path / "results" / "performance.md").read_text()
    assert "| olmoe-1b-7b, npo, middle, in 4GB | 2 |" in written


def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    Figures({"cores": "of another run"}).write(results / "performance.json")
    unknown = ["--size", "small", "--shape", "no-such-shape", *only("steps", "attribution")]
    with pytest.raises(SystemExit, match="failed: steps, attribution"):
        speed.main([*unknown, "--out", str(results), "--shapes", str(tmp_path / "shapes")])
    assert "cores" not in Figures.read(results / "performance.json").environment
