"""Easing a run back to its bound, and the size of weights; what the search as a whole does stands in test_pipeline.

What the selection part shows is scripted, so that each look is exact; model, loss and training are real.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seuf_core.errors import Cancelled
from seuf_core.search import EASED_SHARES, ease, rms
from seuf_core.unlearning.loop import RungResult, train_rung
from seuf_core.unlearning.rule import Quality
from seuf_core.unlearning.scopes import snapshot
from tests.unlearning.test_loop import Recorder, after, make_run, same

# Three looks of the training: one within the bound of .05, then two past it.
WITHIN, PAST = after(0.8), after(0.3, retain=0.8)
TRAINING = [WITHIN, PAST, PAST]


def eased(tmp_path: Path, looks: list[Quality], recorder: Recorder) -> tuple[RungResult, RungResult, float]:
    """The run before and after easing, and the largest difference of its values from the line to the last step."""
    run, seen = make_run(tmp_path, TRAINING + looks, observer=recorder)
    before = train_rung(run, 0, 1e-2)
    result = ease(run, 0, before)
    share = result.best.share
    line = {name: run.initial[name] + share * (seen[2][name] - run.initial[name]) for name in run.initial}
    apart = max(float((result.values[name] - line[name]).abs().max()) for name in line)
    if len(looks) > 1:  # what was looked at is what is kept
        assert same(seen[2 + len(looks)], result.values) == (result.best != before.best)
    return before, result, apart


def test_a_run_past_the_bound_keeps_the_largest_share_that_the_bound_allows(tmp_path: Path) -> None:
    recorder = Recorder()
    looks = [PAST, after(0.35, retain=0.84), after(0.4, retain=0.86)]
    before, result, apart = eased(tmp_path, looks, recorder)
    assert before.best.step == 2
    assert before.best.share == 1.0
    assert (result.best.step, result.best.share) == (6, 0.85)
    assert result.best.quality == looks[-1]
    assert result.best.retain_drop == pytest.approx(0.04)
    assert apart < 1e-7
    assert recorder.of("look", "share") == [1, 1, 1, 0.95, 0.9, 0.85]
    assert recorder.of("look", "best") == [True, False, False, False, False, True]


def test_a_share_that_is_no_better_than_the_best_step_is_not_taken(tmp_path: Path) -> None:
    recorder = Recorder()
    before, result, _ = eased(tmp_path, [after(0.85)], recorder)
    assert result == before
    assert recorder.of("look", "share")[3:] == [0.95], "a smaller share forgets less still"


def test_a_run_that_no_share_brings_back_stays_as_it_was(tmp_path: Path) -> None:
    recorder = Recorder()
    run, _ = make_run(tmp_path, TRAINING, observer=recorder)  # every further look is past the bound too
    before = train_rung(run, 0, 1e-2)
    assert ease(run, 0, before) == before
    assert recorder.of("look", "share")[3:] == list(EASED_SHARES)


def test_a_share_whose_model_gives_no_numbers_is_passed_over(tmp_path: Path) -> None:
    broken = replace(after(0.3), forget_choice=float("nan"))
    _, result, _ = eased(tmp_path, [broken, after(0.4)], Recorder())
    assert result.best.share == 0.9


@pytest.mark.parametrize(
    ("looks", "fields"),
    [
        ([after(0.8), after(0.7), after(0.6)], {}),  # never past the bound
        ([after(0.26), PAST, PAST], {}),  # has forgotten within it
        (TRAINING, {"strength": "fixed"}),
    ],
)
def test_some_runs_need_no_easing(looks: list[Quality], fields: dict[str, str], tmp_path: Path) -> None:
    recorder = Recorder()
    run, _ = make_run(tmp_path, looks, observer=recorder, **fields)
    before = train_rung(run, 0, 1e-2)
    looked = len(recorder.of("look", "step"))
    assert ease(run, 0, before) == before
    assert len(recorder.of("look", "step")) == looked


def test_a_cancel_is_heard_between_two_shares(tmp_path: Path) -> None:
    """On a large model each takes minutes; the six questions before are those of the six steps."""
    recorder = Recorder(9)
    run, _ = make_run(tmp_path, TRAINING, observer=recorder)
    before = train_rung(run, 0, 1e-2)
    with pytest.raises(Cancelled):
        ease(run, 0, before)
    assert recorder.of("look", "share")[3:] == [0.95, 0.9]


def test_easing_is_evaluated_on_the_attached_values(tmp_path: Path) -> None:
    run, seen = make_run(tmp_path, [*TRAINING, after(0.4)])
    result = ease(run, 0, train_rung(run, 0, 1e-2))
    assert same(seen[3], result.values)
    assert same(snapshot(run.trainable), result.values)
    assert not same(seen[3], seen[2])


def test_the_size_of_weights_leaves_out_what_begins_at_zero() -> None:
    values = {"a": torch.tensor([3.0, -4.0]), "b": torch.zeros(100), "c": torch.tensor([[5.0], [0.0]])}
    assert rms(values) == pytest.approx((50 / 4) ** 0.5)
    assert rms({"b": torch.zeros(3)}) == 0.0
