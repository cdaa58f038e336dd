"""The same job with all layers in memory, with those from the lowest target on, and with the targets' alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from seuf_core.inputs import read_inputs
from seuf_core.job import open_job
from seuf_core.method import Method
from seuf_core.observer import Silent
from seuf_core.pipeline import attribute, measure
from seuf_core.plan.setting import Residency
from seuf_core.search import search
from tests import tiny
from tests.test_pipeline import GROWING, QUICK
from tests.test_pipeline import sets as sets  # a fixture

RMU: dict[str, Any] = {"objective": "rmu", "retain_loss": "hidden_mse", "strength": "fixed"}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"router": "train", "anchor_weight": 1.0, "retain_loss": "cross_entropy"},
    "project": {"router": "project"},
    "gradient score": {"attribution": "gradient"},
    "rmu": {**RMU},
    "rmu above the targets": {**RMU, "experts": 1, "rmu_layer": 2},
    "npo": {"objective": "npo", "scope": "router_only", "router": "train"},
    "growing": GROWING,
}


def outcome(
    model: Path, sets: dict[str, Path], work: Path, residency: Residency, method: Method
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every tensor that may have changed, and the test figures."""
    observer = Silent()
    inputs = read_inputs(model, sets["forget"], sets["retain"], None, method, observer)
    job = open_job(model, inputs, method, observer, residency)
    found = search(job, attribute(job).candidates, work, lambda _: None)
    rows = measure(job, found, work)
    return {name: tensor.clone() for name, tensor in found.trainable.disk_tensors().items()}, rows


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "glm_moe_dsa"])
@pytest.mark.parametrize("name", METHODS)
def test_residency_changes_nothing(family: str, name: str, sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", family)
    method = Method(**{**QUICK, **METHODS[name]})
    found = {
        residency: outcome(model, sets, tmp_path / residency, residency, method)
        for residency in get_args(Residency)
    }
    wanted, figures = found["whole"]
    for tensors, rows in found.values():
        assert tensors.keys() == wanted.keys()
        for disk, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, wanted[disk], rtol=0, atol=1e-6, msg=lambda m, n=disk: f"{n}: {m}"
            )
        for row, expected in zip(rows, figures, strict=True):
            assert row == {**expected, "value": pytest.approx(expected["value"], abs=1e-5)}
