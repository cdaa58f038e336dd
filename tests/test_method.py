"""What a method refuses, what it fills in, and which methods need a retain set."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from seuf_core.method import Method


@pytest.mark.parametrize("objective", ["rmu", "adaptive_rmu"])
def test_a_retain_term_that_would_be_ignored_is_refused(objective: str) -> None:
    assert Method(objective=objective).retain_loss == "hidden_mse"  # type: ignore[arg-type]
    assert Method(objective=objective, retain_loss="none").retain_loss == "none"  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="use hidden_mse or none"):
        Method(objective=objective, retain_loss="cross_entropy")  # type: ignore[arg-type]


def test_the_retain_term_follows_the_objective_unless_it_is_given() -> None:
    assert Method(objective="gradient_ascent").retain_loss == "none"
    assert Method(preset="paper").retain_loss == "cross_entropy"
    assert Method(preset="paper", objective="gradient_ascent").retain_loss == "none"
    assert Method(objective="gradient_ascent", retain_loss="cross_entropy").retain_loss == "cross_entropy"
    resolved = Method(preset="paper", steps=7)
    assert Method(**resolved.model_dump(mode="json")) == resolved


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        (Method(), True),
        (Method(objective="gradient_ascent"), True),  # for the contrast
        (Method(objective="gradient_ascent", attribution="affinity"), False),
        (Method(objective="gradient_difference", attribution="affinity"), True),
        (Method(objective="gradient_ascent", scope="full"), False),  # a whole model attributes nothing
    ],
)
def test_who_needs_a_retain_set(method: Method, needs: bool) -> None:
    assert method.needs_retain == needs


def test_the_ladder_is_tried_from_the_strongest_rate_down() -> None:
    assert Method(learning_rate_ladder=(1e-4, 1e-2, 1e-3)).ladder == (1e-2, 1e-3, 1e-4)
    assert Method(learning_rate=5e-4, learning_rate_ladder=(1e-2,)).ladder == (5e-4,)
    ladders = [Method(scope=scope).ladder for scope in ("seuf", "random_expert", "full")]
    assert ladders[0] == ladders[1] != ladders[2]
    assert len({len(ladder) for ladder in ladders}) == 1
    assert all(ladder == tuple(sorted(ladder, reverse=True)) for ladder in ladders)
