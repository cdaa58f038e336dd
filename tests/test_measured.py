"""What a job measures is what its files hold, where a model keeps more digits in memory than on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seuf_core import Method, unlearn
from tests import tiny
from tests.test_pipeline import QUICK, run
from tests.test_pipeline import sets as sets  # a fixture


@pytest.mark.parametrize("family", ["ernie4_5_moe", "hunyuan_v1_moe"])
def test_routers_in_float32_are_measured_as_they_are_written(
    family: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", family, dtype=torch.bfloat16)
    trained = run(model, sets, tmp_path, "out", router="train", scope="router_only", strength="fixed")
    again = unlearn(
        tmp_path / "out",
        sets["forget"],
        None,
        retain=sets["retain"],
        method=Method(**QUICK, strength="fixed"),
        work=tmp_path / "again",
    )

    def figures(metrics: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
        return [{**row, "stage": ""} for row in metrics if row["stage"] == stage]

    assert figures(again.metrics, "before") == figures(trained.metrics, "after")
    assert figures(trained.metrics, "before") != figures(trained.metrics, "after")
