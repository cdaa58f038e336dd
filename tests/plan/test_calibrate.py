"""A calibration leaves nothing behind, and what it measures is possible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seuf_core.moe.skeleton import open_model
from seuf_core.plan.calibrate import _line, calibrate, calibrate_model
from seuf_core.plan.facts import Calibration, model_shape
from seuf_core.plan.measure import anonymous_bytes
from tests import tiny


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "glm_moe_dsa", "llama"])
def test_any_family_is_measured_and_left_as_it_was(family: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", family)
    view = open_model(folder)
    state, random = torch.get_rng_state(), [t.clone() for t in view.model.state_dict().values()]
    found = calibrate(view, model_shape(folder), tmp_path / "work")
    rates = {name: value for name, value in found.as_dict().items() if name.endswith("_rate")}
    assert len(rates) == 7
    assert all(rate > 0 for rate in rates.values()), rates
    assert 0 < found.baseline_bytes < anonymous_bytes()
    assert found.device == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert list((tmp_path / "work").iterdir()) == []
    for before, after in zip(random, view.model.state_dict().values(), strict=True):
        assert before.is_meta == after.is_meta
        assert after.is_meta or torch.equal(before, after)
    assert Calibration.from_dict(found.as_dict()) == found
    older = {name: value for name, value in found.as_dict().items() if name != "reread_rate"}
    assert Calibration.from_dict(older) is None


def test_a_file_just_written_is_in_the_page_cache(tmp_path: Path) -> None:
    assert calibrate_model(tiny.write_model(tmp_path / "model", "olmoe"), "cpu").cached


def test_the_line_through_two_passes() -> None:
    """32 and 256 tokens took 1.32 and 3.56 s: 1 s a call and .01 s a token of 5 operations."""
    fixed, rate = _line([1.32, 3.56], 5)
    assert fixed == pytest.approx(1.0)
    assert rate == pytest.approx(500)
    # More tokens that took no longer: noise. No rate is beyond a tenth of the larger pass.
    fixed, rate = _line([2.0, 1.0], 5)
    assert 0 <= fixed <= 1
    assert rate == pytest.approx(5 * 2560)
