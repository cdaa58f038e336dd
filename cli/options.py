"""Options that several commands share, each defined once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.errors import CommandError

Url = Annotated[str | None, typer.Option(envvar="SEUF_URL", help="Address of the service.")]
Key = Annotated[
    str | None, typer.Option(envvar="SEUF_API_KEY", help="API key (better given as SEUF_API_KEY).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="Entries at most.")]

_METHOD = "Method (what is not given comes from the preset)"
Preset = Annotated[str | None, typer.Option(help="default or paper.", rich_help_panel=_METHOD)]
Objective = Annotated[
    str | None,
    typer.Option(
        help="gradient_ascent, gradient_difference, npo, rmu, adaptive_rmu.", rich_help_panel=_METHOD
    ),
]
Scope = Annotated[str | None, typer.Option(help="seuf, random_expert or full.", rich_help_panel=_METHOD)]
Attribution = Annotated[
    str | None, typer.Option(help="contrast, affinity or random.", rich_help_panel=_METHOD)
]
Experts = Annotated[
    str | None, typer.Option(help="How many experts: auto or a number.", rich_help_panel=_METHOD)
]
Router = Annotated[str | None, typer.Option(help="freeze or train.", rich_help_panel=_METHOD)]
LearningRate = Annotated[str | None, typer.Option(help="auto or a number.", rich_help_panel=_METHOD)]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps at most.", rich_help_panel=_METHOD)]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step.", rich_help_panel=_METHOD)]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.", rich_help_panel=_METHOD)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other field of the method, key=value; may be repeated.", rich_help_panel=_METHOD
    ),
]


def method_of(named: dict[str, Any], others: list[str] | None) -> dict[str, Any]:
    """The method as given: named options and --set together; what was not given is left to the preset.

    Raises:
        CommandError: --set without a value, or a field given twice.
    """
    method = {
        name: value if isinstance(value, int) else _value(value)
        for name, value in named.items()
        if value is not None
    }
    for text in others or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(
                f"--set {text} has no value.", "Write it as --set name=value, such as --set npo_beta=0.2."
            )
        name = name.replace("-", "_")
        if name in method:
            raise CommandError(f"{name} is given twice.", "Give it once.")
        method[name] = _value(value)
    return method


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """name=value texts of a repeated option."""
    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"{option} {text} has no value.", f"Write it as {option} name=value.")
        found[name] = value
    return found


def existing(path: Path, what: str) -> Path:
    """The path, or an error that says which input is missing."""
    if not path.exists():
        raise CommandError(f"The {what} {path} does not exist.", "Check the path.")
    return path


def _value(text: str) -> Any:
    """0.2, 3, true, [1e-4] and the like as JSON; anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text
