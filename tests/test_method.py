"""What a method refuses, what it fills in, and which methods need a retain set."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from pydantic import ValidationError

from seuf_core.errors import MethodError
from seuf_core.method import GROUPS, Method, RouterMode, Scope
from tests.combinations import CHOICES, IMPOSSIBLE


@pytest.mark.parametrize("objective", ["rmu", "adaptive_rmu"])
def test_a_retain_term_that_would_be_ignored_is_refused(objective: str) -> None:
    assert Method(objective=objective).retain_loss == "hidden_mse"  # type: ignore[arg-type]
    assert Method(objective=objective, retain_loss="none").retain_loss == "none"  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Use hidden_mse or none"):
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


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ({}, "retain_loss kl and attribution contrast"),
        ({"router": "project"}, "retain_loss kl and attribution contrast and router project"),
        ({"scope": "router_only", "router": "project"}, "router project"),
        ({"objective": "pdu", "scope": "full"}, "retain_loss kl"),
        ({"objective": "rmu", "scope": "esft"}, "retain_loss hidden_mse"),
    ],
)
def test_a_retain_set_that_is_missing_is_asked_for_with_a_way_out(given: dict[str, str], needs: str) -> None:
    method = Method.model_validate(given)
    method.check_retain(given=True)
    with pytest.raises(MethodError) as refused:
        method.check_retain(given=False)
    assert needs in refused.value.message
    assert refused.value.fix is not None
    ways_out = refused.value.fix.removeprefix("Give one, or use ").removesuffix(".").split(" and ")
    Method.model_validate(given | dict(way.split() for way in ways_out)).check_retain(given=False)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_had(name: str) -> None:
    assert Method.model_validate(CHOICES[name])


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_had_together_is_refused_by_name(name: str) -> None:
    asked, fields, word = IMPOSSIBLE[name]
    with pytest.raises(ValidationError) as refused:
        Method.model_validate(asked)
    (error,) = refused.value.errors()
    assert error["type"] == "method_misfit"
    assert [field for field in error["ctx"]["fields"] if field in asked] == list(fields)
    assert word in error["ctx"]["problem"]
    assert error["ctx"]["fix"]


@pytest.mark.parametrize("router", get_args(RouterMode))
@pytest.mark.parametrize("scope", get_args(Scope))
def test_a_scope_has_the_routers_it_can_train_and_is_refused_the_others(scope: str, router: str) -> None:
    allowed = {
        **dict.fromkeys(("seuf", "random_expert", "top_m"), ("freeze", "train", "project")),
        **dict.fromkeys(("esft", "experts_only", "lora"), ("freeze",)),
        "router_only": ("train", "project"),
        "full": ("freeze", "train"),
    }[scope]
    asked = {"scope": scope, "router": router, **({"experts": 2} if scope == "top_m" else {})}
    if router in allowed:
        method = Method.model_validate(asked)
        assert method.router == router
        assert method.trains_router == (router != "freeze" and scope != "full")
        return
    with pytest.raises(ValidationError) as refused:
        Method.model_validate(asked)
    (error,) = refused.value.errors()
    assert error["ctx"]["fields"] == ("router", "scope")
    assert scope in error["ctx"]["problem"]
    named = re.fullmatch(r"Use router (\w+)(?: or (\w+))?(?:, or scope (\w+))?\.", error["ctx"]["fix"])
    assert named is not None
    for way_out in filter(None, named.groups()[:2]):
        Method.model_validate({**asked, "router": way_out})
    if named.group(3):
        Method.model_validate({**asked, "scope": named.group(3)})


def test_groups_start_at_fields_and_miss_none() -> None:
    assert next(iter(GROUPS)) == next(iter(Method.model_fields))
    assert [name for name in Method.model_fields if name in GROUPS] == list(GROUPS)


def test_the_ladder_is_tried_from_the_strongest_rate_down() -> None:
    assert Method(learning_rate_ladder=(1e-4, 1e-2, 1e-3)).rates(0.5) == (1e-2, 1e-3, 1e-4)
    assert Method(learning_rate=5e-4, learning_rate_ladder=(1e-2,)).rates(0.5) == (5e-4,)
    ladders = [Method(scope=scope).rates(1.0) for scope in ("seuf", "random_expert", "full")]
    assert ladders[0] == ladders[1] != ladders[2]
    assert len({len(ladder) for ladder in ladders}) == 1
    assert all(ladder == tuple(sorted(ladder, reverse=True)) for ladder in ladders)


def test_rates_are_in_proportion_to_the_weights() -> None:
    assert Method().rates(0.075) == (0.003, 0.001)
    assert Method().rates(0.02) == (0.0008, 0.00027)
