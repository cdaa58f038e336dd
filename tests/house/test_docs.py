"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["method_reference", "settings_reference", "families_table", "results_table"])
def test_pages_made_from_code_and_figures_are_current(script: str) -> None:
    check = [sys.executable, f"scripts/{script}.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, f"run: python scripts/{script}.py"
