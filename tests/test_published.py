"""What a job publishes beside the weights, and that a cancel while it writes leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seuf_core.errors import Cancelled
from tests import tiny
from tests.test_pipeline import GROWING, QUICK, Recorder, run
from tests.test_pipeline import sets as sets  # a fixture


def test_the_manifest_names_the_method_and_the_experts_that_won(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    result = run(model, sets, tmp_path, "out", **GROWING)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["extra"]["selection"] == result.selection != []
    assert manifest["extra"]["method"]["steps"] == QUICK["steps"]


class StopsWriting(Recorder):
    """Cancels once something is written."""

    def cancelled(self) -> bool:
        return "publishing" in self.phases


def test_a_cancel_is_heard_while_the_checkpoint_is_written(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    with pytest.raises(Cancelled):
        run(model, sets, tmp_path, "out", StopsWriting())
    assert not list(tmp_path.glob("out*"))
    run(model, sets, tmp_path, "out")
    assert (tmp_path / "out" / "manifest.json").exists()
