"""The selection rule: floored at chance, bounded by what is kept, fixed ties."""

from __future__ import annotations

import pytest

from seuf_core.unlearning.rule import Look, Quality, best


def quality(forget: float = 0.9, said: float = 0.8, kept: float = 0.95, kept_open: float = 0.9) -> Quality:
    return Quality(forget, said, kept, kept_open, 0.25)


BASE = quality()


def look(step: int, q: Quality) -> Look:
    return Look(step, q, q.retain_drop(BASE))


def test_forget_score_is_zero_at_chance_and_silence_and_below() -> None:
    assert quality(0.25, 0.0).forget_score == 0
    assert quality(0.10, 0.0).forget_score == 0
    assert quality(0.45, 0.1).forget_score == pytest.approx(0.3)


def test_retain_drop_is_the_worse_of_choice_and_open() -> None:
    assert quality(kept=0.94, kept_open=0.8).retain_drop(BASE) == pytest.approx(0.1)
    assert quality(kept=0.75, kept_open=0.9).retain_drop(BASE) == pytest.approx(0.2)
    assert quality(kept=0.97, kept_open=0.91).retain_drop(BASE) < 0


def test_best_forgets_most_within_the_bound() -> None:
    looks = [look(0, BASE), look(4, quality(0.5, 0.2, 0.94)), look(8, quality(0.3, 0.0, 0.80))]
    assert best(looks, 0.03).step == 4  # type: ignore[union-attr]
    assert best(looks, 0.2).step == 8  # type: ignore[union-attr]


def test_ties_go_to_the_smaller_drop_then_the_earlier_step() -> None:
    below, at = quality(0.1, 0.0, 0.94), quality(0.25, 0.0, 0.95)
    assert best([look(4, below), look(8, at)], 0.03).step == 8  # type: ignore[union-attr]
    assert best([look(8, at), look(4, at)], 0.03).step == 4  # type: ignore[union-attr]


def test_none_when_every_look_is_past_the_bound() -> None:
    assert best([look(4, quality(kept=0.5))], 0.03) is None


def test_a_look_survives_json() -> None:
    one = look(4, quality(0.5, 0.2, 0.94))
    assert Look.from_dict(one.as_dict()) == one
