"""Every choice of a method that must run everywhere, and every combination that must be refused everywhere.

Library, command and HTTP tests take their cases from here; the choices come from the model, so that a new one
cannot be forgotten.
"""

from __future__ import annotations

from typing import Any, get_args

from seuf_core import method

# A published setting reproduced in a few steps: nothing is searched, so a job ends whatever it reached.
FIXED: dict[str, Any] = {
    "strength": "fixed",
    "learning_rate": 1e-2,
    "steps": 2,
    "batch_size": 4,
    "evaluate_every": 2,
    "max_length": 32,
}
# What a choice cannot do without.
_NEEDS: dict[str, dict[str, Any]] = {"top_m": {"experts": 2}, "hidden_mse": {"objective": "rmu"}}


def _each(field: str, choices: Any) -> dict[str, dict[str, Any]]:
    return {f"{field}={choice}": {field: choice, **_NEEDS.get(choice, {})} for choice in get_args(choices)}


CHOICES: dict[str, dict[str, Any]] = {
    **_each("scope", method.Scope),
    **_each("attribution", method.Attribution),
    **_each("spread", method.Spread),
    **_each("router", method.RouterMode),
    **_each("objective", method.Objective),
    **_each("retain_loss", method.RetainLoss),
    **_each("preset", method.Method.model_fields["preset"].annotation),
}

# name -> what is asked for, the fields the refusal names (first the likeliest mistake), a word of its message
IMPOSSIBLE: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "hidden_mse without rmu": (
        {"objective": "npo", "retain_loss": "hidden_mse"},
        ("retain_loss", "objective"),
        "belongs to rmu",
    ),
    "rmu with a loss of the head": (
        {"objective": "rmu", "retain_loss": "cross_entropy"},
        ("retain_loss", "objective"),
        "runs no output head",
    ),
    "adaptive_rmu with kl": (
        {"objective": "adaptive_rmu", "retain_loss": "kl"},
        ("retain_loss", "objective"),
        "runs no output head",
    ),
    "pdu without a retain loss": (
        {"objective": "pdu", "retain_loss": "none"},
        ("retain_loss", "objective"),
        "weighs its retain loss",
    ),
    "rmu on a whole model": (
        {"objective": "rmu", "scope": "full"},
        ("objective", "scope"),
        "no target layer",
    ),
    "rmu with lora": ({"objective": "rmu", "scope": "lora"}, ("objective", "scope"), "no target layer"),
    "top_m of no given number": ({"scope": "top_m", "experts": "auto"}, ("experts", "scope"), "given number"),
    "top_m one per layer": (
        {"scope": "top_m", "experts": 2, "spread": "one_per_layer"},
        ("spread", "scope"),
        "not one_per_layer",
    ),
    "esft of a given number": ({"scope": "esft", "experts": 3}, ("experts", "scope"), "esft_share"),
    "esft by another score": (
        {"scope": "esft", "attribution": "contrast"},
        ("attribution", "scope"),
        "by token_share",
    ),
    "routers alone, frozen": (
        {"scope": "router_only", "router": "freeze"},
        ("router", "scope"),
        "nothing else",
    ),
    "experts alone, with routers": (
        {"scope": "experts_only", "router": "train"},
        ("router", "scope"),
        "trains no router",
    ),
    "esft with routers": ({"scope": "esft", "router": "project"}, ("router", "scope"), "trains no router"),
    "lora with routers": ({"scope": "lora", "router": "train"}, ("router", "scope"), "trains no router"),
    "a whole model, projected": (
        {"scope": "full", "router": "project"},
        ("router", "scope"),
        "trains every router",
    ),
    "a fixed strength without a rate": (
        {"strength": "fixed", "learning_rate": "auto"},
        ("learning_rate", "strength"),
        "searches for nothing",
    ),
}


def _makes_sense(asked: dict[str, Any]) -> bool:
    """Whether every field of `asked` has an effect: a whole model has no score, and a frozen scope no router."""
    try:
        made = method.Method.model_validate({**FIXED, **asked})
    except ValueError:
        return False
    return made.selects_experts or not {"attribution", "spread", "router"} & asked.keys()


def packed() -> list[dict[str, Any]]:
    """Few methods that together have every choice at least once, for tests in which each job takes seconds."""
    left, rows = list(CHOICES.values()), []
    while left:
        row: dict[str, Any] = {}
        for choice in list(left):
            agrees = all(row.get(field, value) == value for field, value in choice.items())
            if agrees and not choice.items() <= row.items() and _makes_sense({**row, **choice}):
                row |= choice
        left = [choice for choice in left if not choice.items() <= row.items()]
        assert row, left
        rows.append(row)
    return rows


# What may differ on disk, by scope: experts, routers, or the rest of the model.
TRAINED: dict[str, set[str]] = {
    "seuf": {"expert"},
    "random_expert": {"expert"},
    "top_m": {"expert"},
    "esft": {"expert"},
    "experts_only": {"expert"},
    "router_only": {"router"},
    "lora": {"rest"},
    "full": {"expert", "router", "rest"},
}


def trained_parts(asked: dict[str, Any]) -> set[str]:
    """What a job with these fields changes."""
    made = method.Method.model_validate({**FIXED, **asked})
    return TRAINED[made.scope] | ({"router"} if made.trains_router else set())


def changed_parts(manifest: dict[str, Any]) -> set[str]:
    """What a manifest says was changed (names of qwen2_moe)."""
    names = [entry["tensor"] for entry in manifest["changed"]]
    return {
        "expert" if ".experts." in n else "router" if n.endswith("mlp.gate.weight") else "rest" for n in names
    }
