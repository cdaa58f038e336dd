"""The benchmark of writing measures what it says, and fails where what was written is not what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.shapes import tiny_fields, write_shape
from benchmarks.writing import check_equal, measure_writing, new_expert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMoE of some hundred kB in several shards."""
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    return write_shape("olmoe-1b-7b", folder, shard_bytes=100_000, **tiny_fields("olmoe-1b-7b"))


def test_figures_of_every_way_and_of_the_delta(base: Path, tmp_path: Path) -> None:
    found = measure_writing(base, tmp_path, 2, rounds=1)
    ways = {name.partition("/")[0] for name in found}
    assert ways == {"save_pretrained", "first", "again", "copied", "delta"}
    assert all(value >= 0 for value, _ in found.values())
    assert found["delta/bytes"][0] > 3 * 64 * 32 * 2
    assert not (tmp_path / "written").exists()


def test_a_model_that_differs_in_one_weight_is_seen(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    check_equal(model, base, {})
    changed = new_expert(base, 2)
    with pytest.raises(AssertionError, match=r"layers\.2\.mlp\.experts\.0"):
        check_equal(model, base, changed)
