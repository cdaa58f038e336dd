"""The selection rule: floored at chance, bounded by what is kept, fixed ties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from seuf_core.data.batches import Encoded
from seuf_core.data.records import Probe
from seuf_core.evaluate.probes import EncodedProbe, ProbeScore
from seuf_core.unlearning.rule import Look, Quality, best, order, quality_of


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


def test_ties_within_a_run_go_to_the_later_step() -> None:
    below, at = quality(0.1, 0.0, 0.94), quality(0.25, 0.0, 0.95)
    assert best([look(4, at), look(8, below)], 0.03).step == 8  # type: ignore[union-attr]
    assert best([look(8, at), look(4, at)], 0.03).step == 8  # type: ignore[union-attr]
    assert best([look(0, BASE), look(4, BASE)], 0.03).step == 0  # type: ignore[union-attr]


def test_ties_between_runs_go_to_the_smaller_drop_then_the_earlier_step() -> None:
    below, at = quality(0.1, 0.0, 0.94), quality(0.25, 0.0, 0.95)
    assert min([look(4, below), look(8, at)], key=order).step == 8
    assert min([look(8, at), look(4, at)], key=order).step == 4


def test_rounding_in_binary_breaks_no_tie() -> None:
    """.3 is not .1 + .2 there: neither a score nor a drop is smaller for that."""
    more, less = look(4, quality(0.25, 0.1 + 0.2)), look(8, quality(0.25, 0.3))
    assert more.quality.forget_score > less.quality.forget_score
    assert best([more, less], 0.03) == less
    assert min([more, less], key=order) == more
    later = replace(more, step=8, retain_drop=0.3 - 1e-16)
    assert min([replace(more, retain_drop=0.1 + 0.2), later], key=order).step == 4


def test_none_when_every_look_is_past_the_bound() -> None:
    assert best([look(4, quality(kept=0.5))], 0.03) is None


def test_the_bound_itself_is_within_the_bound() -> None:
    """.9 - .87 is .03 and a little in binary; .04 is past it."""
    at, past = look(4, quality(0.5, 0.2, 0.95, 0.87)), look(8, quality(0.3, 0.0, 0.91))
    assert at.retain_drop > 0.03
    assert best([look(0, BASE), at, past], 0.03) == at


def test_falling_to_a_level_is_not_having_been_there() -> None:
    low, lower = quality(0.26, 0.0), quality(0.25, 0.0)
    assert lower.fell_to(0.02, BASE)
    assert not quality(0.3, 0.0).fell_to(0.02, BASE)
    assert not lower.fell_to(0.02, low)


def encoded(side: str, choices: int) -> EncodedProbe:
    texts = tuple(f" {c}" for c in range(choices))
    sequences = (Encoded([5, 6], 1, False),) * choices
    return EncodedProbe(Probe("p", "?", texts, 0, "f", "", side), sequences)  # type: ignore[arg-type]


def test_figures_of_questions_with_choices() -> None:
    """Right choices are counted, whatever their probability; chance is the mean of 1 / choices on forget."""
    probes = [encoded("forget", 2), encoded("retain", 8), encoded("forget", 4), encoded("forget", 4)]
    scores = [
        ProbeScore(True, False, False, 0.6),
        ProbeScore(False, False, True, 0.4),
        ProbeScore(False, True, True, 0.1),
        ProbeScore(False, True, False, 0.2),
    ]
    expected = Quality(1 / 3, 1 / 3, 0.0, 1.0, (1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert quality_of(probes, scores) == expected


def test_figures_of_examples_are_their_probability_and_chance_is_nothing() -> None:
    probes = [encoded("forget", 1), encoded("forget", 1), encoded("retain", 4)]
    scores = [
        ProbeScore(True, False, True, 0.8),
        ProbeScore(True, False, False, 0.4),
        ProbeScore(True, False, False, 0.9),
    ]
    found = quality_of(probes, scores)
    assert (found.forget_choice, found.forget_open) == (pytest.approx(0.6), 0.5)
    assert (found.retain_choice, found.retain_open, found.chance) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("choices", [1, 4])
def test_a_side_to_which_the_model_gave_no_number_has_no_figures(choices: int) -> None:
    """NaN chooses nothing and says nothing: that would look like perfect forgetting."""
    probes = [encoded("forget", choices)] * 2 + [encoded("retain", choices)]
    broken = ProbeScore(False, False, False, math.nan)
    fine = ProbeScore(True, False, True, 0.9)
    found = quality_of(probes, [fine, broken, fine])
    assert not found.finite
    assert math.isnan(found.forget_choice)
    assert math.isnan(found.forget_open)
    assert found.retain_open == 1
    assert quality_of(probes, [fine] * 3).finite


def test_a_look_survives_json() -> None:
    one = look(4, quality(0.5, 0.2, 0.94))
    assert Look.from_dict(one.as_dict()) == one
