"""The training loop on a real tiny model: which step wins, when it ends, and that nothing is lost in between.

What the selection part shows is scripted where the rule is tested, so that each look is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seuf_core.data.batches import batch_indices
from seuf_core.errors import Cancelled
from seuf_core.method import Method
from seuf_core.moe.forward import Forward
from seuf_core.moe.view import moe_view
from seuf_core.observer import Silent
from seuf_core.unlearning.loop import Run, train_rung
from seuf_core.unlearning.objectives import Objective, Terms, TrainingData, build_objective
from seuf_core.unlearning.rule import Quality
from seuf_core.unlearning.scopes import ExpertScope, Trainable, Values, WholeModelScope, snapshot
from seuf_core.unlearning.state import TrainingState, moments_of, restore_moments
from tests import tiny
from tests.unlearning.test_objectives import FORGET, RETAIN, TARGETS

BASE = Quality(0.9, 0.8, 0.9, 0.9, 0.25)
METHOD = Method(steps=6, batch_size=2, evaluate_every=2, max_retain_drop=0.05)


class Recorder(Silent):
    """Keeps events; cancels at each of the given numbers of questions."""

    def __init__(self, *cancel_at: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.asked, self.cancel_at = 0, cancel_at

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        self.events.append((type, data))

    def cancelled(self) -> bool:
        self.asked += 1
        return self.asked in self.cancel_at

    def of(self, name: str, key: str) -> list[Any]:
        return [data[key] for kind, data in self.events if kind == name]


def after(forget: float, retain: float = 0.9) -> Quality:
    return replace(BASE, forget_choice=forget, forget_open=0.0, retain_choice=retain)


GOOD = [after(0.6), after(0.5), after(0.4)]


def make_run(
    tmp_path: Path,
    looks: Sequence[Quality] = GOOD,
    *,
    observer: Recorder | None = None,
    whole: bool = False,
    wrap: Callable[[Objective], Objective] = lambda objective: objective,
    **fields: Any,
) -> tuple[Run, list[Values]]:
    """A run from the base weights, and the values the model had at each of its looks."""
    view = moe_view(tiny.build_model("olmoe", tie_word_embeddings=True))
    trainable: Trainable = WholeModelScope(view) if whole else ExpertScope(view, TARGETS, train_router=False)
    method = METHOD.model_copy(update=fields)
    data = TrainingData(FORGET, RETAIN)
    seen: list[Values] = []

    def evaluate() -> Quality:
        seen.append(snapshot(trainable))
        return looks[min(len(seen), len(looks)) - 1]

    run = Run(
        method=method,
        trainable=trainable,
        initial=snapshot(trainable),
        objective=wrap(build_objective(Forward(view), method, data, {} if whole else TARGETS)),
        evaluate=evaluate,
        base=BASE,
        sizes=(len(FORGET), len(RETAIN)),
        runs=1,
        work=tmp_path,
        fingerprint="one",
        observer=observer or Recorder(),
    )
    return run, seen


def same(a: Values, b: Values) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_looks_every_few_steps_and_after_the_last(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, steps=5)
    result = train_rung(run, 0, 1e-3)
    assert [look.step for look in result.looks] == [0, 2, 4, 5]
    assert result.looks[0].quality == BASE


@pytest.mark.parametrize(
    ("looks", "step"),
    [
        (GOOD, 6),
        ([after(0.4), after(0.5), after(0.6)], 2),
        ([after(0.6), after(0.5), after(0.3, retain=0.8)], 4),  # the last kept too little
    ],
)
def test_the_values_are_those_of_the_best_step(looks: list[Quality], step: int, tmp_path: Path) -> None:
    run, seen = make_run(tmp_path, looks)
    result = train_rung(run, 0, 1e-3)
    assert result.best.step == step
    assert same(result.values, seen[step // 2 - 1])
    assert not same(seen[0], seen[1])


def test_the_base_stays_when_no_step_is_within_the_bound(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, [after(0.3, retain=0.8)])
    result = train_rung(run, 0, 1e-3)
    assert result.best.step == 0
    assert same(result.values, run.initial)


def test_a_collapsed_run_ends_and_one_that_may_come_back_does_not(tmp_path: Path) -> None:
    """Past five times the bound of .05, not at it."""
    gone, back = after(0.3, retain=0.64), after(0.3, retain=0.66)
    for folder, look, last in (("a", gone, 2), ("b", back, 6)):
        observer = Recorder()
        run, _ = make_run(tmp_path / folder, [look], observer=observer)
        train_rung(run, 0, 1e-3)
        assert observer.of("step", "step")[-1] == last


def test_under_a_small_bound_a_run_may_still_lose_something_before_it_ends(tmp_path: Path) -> None:
    """Five times .01 is a single probe of twenty: the guard is never below .15."""
    for folder, retain, last in (("a", 0.76, 6), ("b", 0.74, 2)):
        observer = Recorder()
        run, _ = make_run(tmp_path / folder, [after(0.3, retain)], observer=observer, max_retain_drop=0.01)
        train_rung(run, 0, 1e-3)
        assert observer.of("step", "step")[-1] == last


@pytest.mark.parametrize("look", [after(0.25), after(0.3, retain=0.1)])
def test_a_run_of_fixed_strength_ends_at_its_last_step_only(look: Quality, tmp_path: Path) -> None:
    """Neither when nothing is left to forget nor when it has collapsed."""
    observer = Recorder()
    run, seen = make_run(tmp_path, [look], observer=observer, strength="fixed", learning_rate=1e-3)
    result = train_rung(run, 0, 1e-3)
    assert observer.of("step", "step")[-1] == result.best.step == 6
    assert same(result.values, seen[-1])


def test_a_cancel_at_the_last_step_finds_the_run_finished(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, observer=Recorder(6))
    assert train_rung(run, 0, 1e-3).best.step == 6


def test_a_run_with_nothing_left_to_forget_ends(tmp_path: Path) -> None:
    """One look at chance may be luck: the second one running ends it, and is the one that is kept."""
    observer = Recorder()
    looks = [after(0.6), after(0.25), after(0.4), after(0.24), after(0.25), after(0.25)]
    run, seen = make_run(tmp_path, looks, observer=observer, steps=20)
    result = train_rung(run, 0, 1e-3)
    assert result.best.step == 10
    assert same(result.values, seen[4])
    assert observer.of("step", "step")[-1] == 10


def test_a_look_past_the_bound_ends_no_run_however_much_it_forgot(tmp_path: Path) -> None:
    observer = Recorder()
    looks = [after(0.6), after(0.25, retain=0.8), after(0.25), after(0.25), after(0.25)]
    run, _ = make_run(tmp_path, looks, observer=observer, steps=20)
    assert train_rung(run, 0, 1e-3).best.step == 8
    assert observer.of("step", "step")[-1] == 8


def test_a_base_that_never_knew_is_trained_all_the_same(tmp_path: Path) -> None:
    observer = Recorder()
    run, _ = make_run(tmp_path, [after(0.25)], observer=observer)
    train_rung(replace(run, base=replace(after(0.25), forget_open=0.01)), 0, 1e-3)
    assert observer.of("step", "step")[-1] == 6


class Wrapped:
    """An objective whose terms are made by another function; its state is its own."""

    def __init__(
        self, objective: Objective, terms_of: Callable[[Sequence[int], Sequence[int]], Terms]
    ) -> None:
        self._terms_of, self.halve = terms_of, objective.halve
        self.state, self.load_state = objective.state, objective.load_state

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        return self._terms_of(forget, retain)


def nan_from(call: int) -> Callable[[Objective], Objective]:
    """The objective, giving NaN from its `call`-th call on."""

    def wrap(objective: Objective) -> Objective:
        calls = []

        def terms_of(forget: Sequence[int], retain: Sequence[int]) -> Terms:
            calls.append(1)
            terms = objective(forget, retain)
            return replace(terms, forget=terms.forget * math.nan) if len(calls) >= call else terms

        return Wrapped(objective, terms_of)

    return wrap


def test_a_loss_that_is_no_number_moves_nothing_and_ends_the_run(tmp_path: Path) -> None:
    observer = Recorder()
    run, seen = make_run(tmp_path, observer=observer, wrap=nan_from(4))
    result = train_rung(run, 0, 1e-3)
    assert observer.of("step", "step") == [1, 2, 3]
    assert observer.of("warning", "code") == ["diverged"]
    assert result.best.step == 2
    assert same(result.values, seen[0])
    assert all(bool(value.isfinite().all()) for value in snapshot(run.trainable).values())


@pytest.mark.parametrize("figures", [{"forget_choice": math.nan}, {"retain_choice": math.nan}])
def test_a_model_that_gives_no_numbers_is_never_the_best(figures: dict[str, float], tmp_path: Path) -> None:
    observer = Recorder()
    broken = replace(after(0.25), **figures)
    run, seen = make_run(tmp_path, [after(0.6), broken], observer=observer)
    result = train_rung(run, 0, 1e-3)
    assert result.best.step == 2
    assert same(result.values, seen[0])
    assert observer.of("warning", "code") == ["diverged"]
    assert [look.step for look in result.looks] == [0, 2]


def test_each_step_trains_on_the_batches_of_its_number(tmp_path: Path) -> None:
    taken: list[tuple[list[int], list[int]]] = []

    def wrap(objective: Objective) -> Objective:
        def terms_of(forget: Sequence[int], retain: Sequence[int]) -> Terms:
            taken.append((list(forget), list(retain)))
            return objective(forget, retain)

        return Wrapped(objective, terms_of)

    run, _ = make_run(tmp_path, wrap=wrap, seed=3)
    train_rung(run, 0, 1e-3)
    assert taken == [(batch_indices(5, 2, 3, step), batch_indices(4, 2, 4, step)) for step in range(6)]


def test_what_has_no_gradient_stays(tmp_path: Path) -> None:
    """Weight decay would move it."""

    def wrap(objective: Objective) -> Objective:
        def terms_of(forget: Sequence[int], retain: Sequence[int]) -> Terms:
            terms = objective(forget, retain)
            return Terms(terms.forget * 0, terms.retain * 0, terms.anchor)

        return Wrapped(objective, terms_of)

    run, _ = make_run(tmp_path, wrap=wrap)
    train_rung(run, 0, 1e-2)
    assert same(snapshot(run.trainable), run.initial)


def test_every_rung_starts_from_the_base(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "a", GOOD[:1])
    train_rung(run, 0, 5e-2)
    second = train_rung(run, 1, 1e-3)
    alone, _ = make_run(tmp_path / "b", GOOD[:1])
    assert same(second.values, train_rung(alone, 1, 1e-3).values)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_a_cancelled_run_goes_on_as_if_nothing_had_happened(
    stop_at: int, whole: bool, tmp_path: Path
) -> None:
    """Experts, and a whole model whose input and output embeddings are one tensor."""
    undisturbed, _ = make_run(tmp_path / "a", whole=whole)
    expected = train_rung(undisturbed, 0, 1e-3)
    stopped, _ = make_run(tmp_path / "b", whole=whole, observer=Recorder(stop_at))
    with pytest.raises(Cancelled):
        train_rung(stopped, 0, 1e-3)
    observer = Recorder()
    resumed, _ = make_run(tmp_path / "b", GOOD[stop_at // 2 :], whole=whole, observer=observer)
    found = train_rung(resumed, 0, 1e-3)
    assert observer.of("step", "step") == list(range(stop_at + 1, 7))
    assert found.looks == expected.looks
    assert same(found.values, expected.values)
    assert same(snapshot(resumed.trainable), snapshot(undisturbed.trainable))


def test_a_finished_rung_is_not_trained_again(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    first = train_rung(run, 0, 1e-3)
    observer = Recorder()
    again, _ = make_run(tmp_path, observer=observer)
    second = train_rung(again, 0, 1e-3)
    assert not observer.events
    assert second.best == first.best
    assert same(second.values, first.values)


@pytest.mark.parametrize("other", ["fingerprint", "rate"])
def test_a_training_checkpoint_of_another_run_is_ignored(other: str, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    train_rung(run, 0, 1e-3)
    observer = Recorder()
    again, _ = make_run(tmp_path, observer=observer)
    if other == "fingerprint":
        train_rung(replace(again, fingerprint="another"), 0, 1e-3)
    else:
        train_rung(again, 0, 2e-3)
    assert observer.of("step", "step")[0] == 1


def test_an_answer_that_comes_between_two_questions_loses_no_step(tmp_path: Path) -> None:
    """Cancelled is raised only after the question whose answer saved the step."""
    for at in range(1, 6):
        run, _ = make_run(tmp_path / str(at), observer=Recorder(at))
        with pytest.raises(Cancelled):
            train_rung(run, 0, 1e-3)
        state = TrainingState.load(tmp_path / str(at) / "rung-0.safetensors", f"one/{1e-3!r}")
        assert state is not None
        assert state.step == at


def test_a_state_survives_its_file(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).view(2, 3).T  # not contiguous
    state = TrainingState(
        7,
        {"a/b": transposed, "c": torch.tensor([1.5], dtype=torch.bfloat16)},
        {"a/b": {"exp_avg": transposed + 1, "step": torch.tensor(7.0)}},
        {"a/b": transposed * 2, "c": torch.tensor([2.5], dtype=torch.bfloat16)},
        [{"step": 0}],
        finished=True,
    )
    state.save(tmp_path / "deep" / "s.safetensors", "f")
    found = TrainingState.load(tmp_path / "deep" / "s.safetensors", "f")
    assert found is not None
    assert (found.step, found.looks, found.finished) == (7, [{"step": 0}], True)
    assert same(found.values, state.values)
    assert same(found.best_values, state.best_values)
    assert same(found.moments["a/b"], state.moments["a/b"])
    assert TrainingState.load(tmp_path / "deep" / "s.safetensors", "g") is None
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


def test_moments_return_to_the_device_of_their_parameter() -> None:
    """Fused AdamW wants its averages and its step count beside the gradient."""
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([trained], lr=0.1, fused=True)
    trained.sum().backward()
    optimizer.step()
    moments = moments_of(optimizer, {"w": trained})
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    other = torch.optim.AdamW([elsewhere], lr=0.1)
    restore_moments(other, {"w": elsewhere}, moments)
    devices = {key: tensor.device.type for key, tensor in other.state[elsewhere].items()}
    assert devices == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta"}
