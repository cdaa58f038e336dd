"""One attempt of a search after another, on whole jobs: where each begins, which are made, and what a cancel leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seuf_core.errors import Cancelled, MethodError, ModelError
from seuf_core.method import Method
from tests import tiny
from tests.test_pipeline import GROWING, Recorder, run, rungs, tensors
from tests.test_pipeline import sets as sets  # a fixture

# Each of two selections is trained at a rate that breaks this bound and eased, then at a weaker one.
EASED: dict[str, Any] = {
    **GROWING,
    "learning_rate": "auto",
    "learning_rate_ladder": (5e-2, 1e-2),
    "max_retain_drop": 1e-4,
}


class StopsEasing(Recorder):
    """Cancels at the question that follows the n-th look at a share of a change."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.stop_at = stop_at

    def cancelled(self) -> bool:
        shares = [data["share"] for kind, data in self.events if kind == "look"]
        return sum(share < 1 for share in shares) >= self.stop_at


def steps(recorder: Recorder) -> list[int]:
    return [data["step"] for kind, data in recorder.events if kind == "step"]


@pytest.mark.parametrize("stop_at", [1, 12])
def test_a_job_cancelled_while_it_is_eased_continues_to_bit_identical_weights(
    stop_at: int, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    whole = Recorder()
    run(model, sets, tmp_path, "undisturbed", whole, **EASED)
    with pytest.raises(Cancelled):
        run(model, sets, tmp_path, "resumed", StopsEasing(stop_at), **EASED)
    recorder = Recorder()
    run(model, sets, tmp_path, "resumed", recorder, **EASED)
    assert rungs(recorder) == rungs(whole)
    assert len(steps(recorder)) < len(steps(whole)), "the run began again instead of continuing"
    delta = (tmp_path / "undisturbed" / "delta.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "delta.safetensors").read_bytes() == delta


def test_what_is_written_is_the_share_that_won(sets: dict[str, Path], tmp_path: Path) -> None:
    """Neither the last step whole, nor the best step before the easing."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    result = run(model, sets, tmp_path, "out", recorder, **EASED)
    share = result.chosen["share"]
    assert 0.5 <= share < 1
    [winner] = [rung for rung in rungs(recorder) if rung["share"] == share]
    last = load_file(tmp_path / "work-out" / f"rung-{winner['rung']}.safetensors")
    before, after = tensors(model), tensors(tmp_path / "out")
    for target in result.selection:
        layer, expert = target["layer"], target["expert"]
        on_disk = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        wanted = torch.lerp(before[on_disk], last[f"value/layers.{layer}.experts.{expert}.down_proj"], share)
        assert torch.equal(after[on_disk], wanted)


@pytest.mark.parametrize("router", ["freeze", "train", "project"])
def test_each_attempt_begins_with_the_base(router: str, sets: dict[str, Path], tmp_path: Path) -> None:
    """The larger selection ends the same whether a smaller one was trained and eased before it or not."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    both, alone = Recorder(), Recorder()
    for recorder, first in ((both, 0.4), (alone, 1.0)):
        fields = {**EASED, "coverage": first, "router": router}
        run(model, sets, tmp_path, f"from {first}", recorder, **fields)
    assert [len(rung["experts"]) for rung in rungs(both)] == [1, 1, 3, 3]
    assert rungs(both)[1]["step"] > 0, "the first attempt changed nothing, so this shows nothing"

    def of_three(recorder: Recorder) -> list[dict[str, Any]]:
        return [{**rung, "rung": 0} for rung in rungs(recorder) if len(rung["experts"]) == 3]

    assert of_three(both) == of_three(alone)


def test_a_weaker_rate_is_tried_where_a_stronger_one_breaks_the_model_before_its_first_look(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    """No look past the bound does not mean within it from end to end."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe", dtype=torch.float16)
    recorder = Recorder()
    rates = {"learning_rate": "auto", "learning_rate_ladder": (1.0, 1e-2), "steps": 10, "evaluate_every": 10}
    result = run(model, sets, tmp_path, "out", recorder, objective="gradient_ascent", **rates)
    assert [rung["step"] for rung in rungs(recorder)] == [0, 10]
    assert result.chosen["learning_rate"] == 1e-2


@pytest.mark.parametrize("objective", ["rmu", "npo"])
def test_no_selection_grows_above_the_layer_that_is_steered(
    objective: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    """Experts above it never reach the loss, which for every other objective they do."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    fields = {**GROWING, "coverage": 0.2, "max_experts": 6, "rmu_layer": 1, "learning_rate": 5e-2}
    run(model, sets, tmp_path, "out", recorder, objective=objective, **fields)
    highest = [max(target["layer"] for target in rung["experts"]) for rung in rungs(recorder)]
    assert highest[0] == 1
    assert (max(highest) == 1) == (objective == "rmu")


def test_a_base_that_gives_no_numbers_is_refused_before_the_training(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe", max_shard_size="1GB")
    held = load_file(model / "model.safetensors")
    held["lm_head.weight"][0] = float("nan")
    save_file(held, model / "model.safetensors", {"format": "pt"})
    recorder = Recorder()
    with pytest.raises(ModelError) as caught:
        run(model, sets, tmp_path, "out", recorder)
    assert caught.value.code == "no_numbers"
    assert not steps(recorder)


def test_the_smaller_selection_wins_a_tie(sets: dict[str, Path], tmp_path: Path) -> None:
    """At this rate no value moves, so that all runs are as good as the base."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    with pytest.raises(MethodError) as caught:
        run(model, sets, tmp_path, "out", recorder, **{**GROWING, "learning_rate": 1e-12})
    assert caught.value.code == "nothing_forgotten"
    announced = [data["experts"] for kind, data in recorder.events if kind == "selection"]
    assert [len(experts) for experts in announced] == [1, 3, 1]


def test_rates_follow_the_size_of_what_is_trained(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    method = Method(experts=1, learning_rate="auto")
    run(model, sets, tmp_path, "out", recorder, experts=1, learning_rate="auto", steps=1)
    [target] = rungs(recorder)[0]["experts"]
    stem = f"model.layers.{target['layer']}.mlp.experts.{target['expert']}."
    weights = [value for name, value in tensors(model).items() if name.startswith(stem)]
    size = float(torch.cat([value.flatten() for value in weights]).double().square().mean().sqrt())
    assert len(weights) == 3
    assert rungs(recorder)[0]["learning_rate"] == method.rates(size)[0]
