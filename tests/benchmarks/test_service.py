"""The service benchmark runs, small, and its page says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.figures import Figures
from benchmarks.service import __main__ as service
from benchmarks.service import page
from benchmarks.service.wire import percentiles

RESULTS = Path("docs/results")


def figures() -> Figures:
    made = Figures({"cpus": 2})
    made.add("latency/postgres/get/ratio_p99", 1.4, "ratio")
    made.add("latency/postgres/get/ours/p50", 0.002, "s")
    made.add("latency/postgres/unchanged/ours/p50", 0.001, "s")
    made.add("transfer/download/ratio", 0.65, "ratio")
    made.add("whole/service/seconds", 64.0, "s")
    made.add("whole/run/seconds", 60.0, "s")
    made.add("load/descriptors/after", 31, "descriptors")
    return made


def test_the_page_says_which_goals_are_met() -> None:
    lines = page.text(figures()).splitlines()
    assert "| p99 of GET /jobs/{id} over a bare endpoint's, Postgres | 1.4 | <= 1.5 | yes |" in lines
    assert "| download over nginx | 0.65 | >= 0.7 | no |" in lines
    assert "| seconds of the service on a whole job | 4.0 | <= 5.0 | yes |" in lines
    assert "| conditional GET over GET, postgres | 0.50 | < 1 | yes |" in lines
    assert "| descriptors, after | 31 |" in lines
    assert "| get, ours, p50 | 2.00 ms |" not in lines  # its section is of both databases
    assert "| postgres, get, ours, p50 | 2.00 ms |" in lines
    assert "## Event streams" not in lines


def test_percentiles() -> None:
    cut = percentiles([number / 100 for number in range(101)])
    assert cut == pytest.approx({"p50": 0.5, "p95": 0.95, "p99": 0.99})


def test_the_page_is_made_from_the_figures() -> None:
    if not (RESULTS / "service.json").exists():
        pytest.skip("not measured yet: make benchmark-service")
    assert (RESULTS / "service.md").read_text() == page.text(Figures.read(RESULTS / "service.json"))


@pytest.mark.long
@pytest.mark.parametrize("part", sorted(service.PARTS))
def test_every_part_runs(part: str, tmp_path: Path) -> None:
    service.main(["--size", "small", "--only", part, "--out", str(tmp_path)])
    made = Figures.read(tmp_path / "service.json")
    assert made.names(f"{part}/") == made.names()
    assert len(made.names()) >= 3
    assert (tmp_path / "service.md").read_text() == page.text(made)
