"""The families page has a cell for every test of every family, from a run on this transformers."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

from seuf_core.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/families.md").read_text()
RESULTS = json.loads((ROOT / "docs/results/families.json").read_text())


def every_family_tests() -> set[str]:
    """Names of the tests in tests/families that go through all rows."""
    source = "\n".join(file.read_text() for file in sorted((ROOT / "tests/families").glob("test_*.py")))
    return set(re.findall(r"^@EVERY_FAMILY\n(?:@.*\n)*def (test_\w+)", source, re.MULTILINE))


def test_every_family_passed_every_test() -> None:
    wanted = every_family_tests()
    assert len(wanted) >= 9, "the pattern above no longer finds them"
    assert {family: set(passed) for family, passed in RESULTS["passed"].items()} == dict.fromkeys(
        FAMILIES, wanted
    )


def test_no_cell_is_empty() -> None:
    table = PAGE.partition("## What was tested")[2].partition("- **")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    families = {row[0].strip(" `") for row in rows} - {"model_type"}
    assert families == set(FAMILIES)
    for row in rows[1:]:
        assert [cell.strip() for cell in row[1:]] == ["passed"] * len(every_family_tests()), row[0]


def test_the_run_was_on_this_transformers() -> None:
    assert RESULTS["transformers"] == version("transformers"), "run: make families"
