"""docs/results/defaults.md says what defaults.json says, in every case the benchmark has."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import defaults
from benchmarks.figures import Figures
from seuf_core.reference.architecture import Architecture, Specialisation

RESULTS = Path("docs/results")


def test_the_page_is_made_from_the_figures() -> None:
    figures = Figures.read(RESULTS / "defaults.json").values()
    assert (RESULTS / "defaults.md").read_text() == defaults.table(figures)
    cases = {name.rsplit("/", 1)[0] for name in figures}
    kinds = product(get_args(Architecture), get_args(Specialisation), ("0", "2"))
    assert cases == {"/".join(kind) for kind in kinds}


def figures(**changed: float) -> dict[str, float]:
    fine = {"choice": 0.25, "open": 0.0, "experts": 4, "parameters_changed_share": 0.04, "seconds": 30}
    fine |= dict.fromkeys(("drop_choice_mean", "drop_choice_worst", "drop_open_mean", "drop_open_worst"), 0.01)
    return {f"qwen2_moe/strong/0/{name}": value for name, value in (fine | changed).items()}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "yes"),
        ({"choice": 0.33}, "no: choice"),
        ({"choice": 0.14}, "no: choice"),  # knowledge inverted
        ({"open": 0.04}, "no: open"),
        ({"drop_open_worst": 0.08}, "no: lost, worst"),
        ({"drop_choice_mean": 0.06}, "no: lost, mean"),
        ({"drop_open_mean": -0.02}, "yes"),
    ],
)
def test_a_case_says_which_bounds_it_missed(changed: dict[str, float], verdict: str) -> None:
    assert defaults.table(figures(**changed)).rstrip().endswith(f"| {verdict} |")
