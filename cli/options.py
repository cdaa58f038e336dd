"""Options that several commands share, each defined once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import CommandError

Url = Annotated[str | None, typer.Option(envvar="SEUF_URL", help="Address of the service.")]
Key = Annotated[
    str | None, typer.Option(envvar="SEUF_API_KEY", help="API key (better given as SEUF_API_KEY).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="Entries at most.")]
Model = Annotated[Path, typer.Option(help="Folder of the base model; it is only read.")]
Forget = Annotated[Path, typer.Option(help="What to forget: JSON Lines, CSV, Parquet or text, by its extension.")]
Retain = Annotated[Path | None, typer.Option(help="What to keep, likewise.")]
Evaluation = Annotated[Path | None, typer.Option(help="Probes for both: JSON Lines, CSV or Parquet.")]
Memory = Annotated[
    str | None,
    typer.Option(
        envvar="SEUF_MEMORY", help="Memory the run may use; default: what is free.", metavar="SIZE, e.g. 6GB"
    ),
]
Hardlinks = Annotated[
    bool,
    typer.Option(
        "--hardlinks",
        help="Unchanged shards may be the base's own files under a second name (hard links) where the file system "
        "has no reflinks: written in an instant. Only for folders into whose files nobody writes.",
    ),
]
Heatmap = Annotated[
    Path | None, typer.Option(help="File to draw the scores to: layer x expert (SVG).", metavar="FILE.svg")
]


def pairs(texts: list[str] | None, option: str) -> list[tuple[str, str]]:
    """name=value texts of a repeated option."""
    found = []
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"{option} {text} has no value.", f"Write it as {option} name=value.")
        found.append((name, value))
    return found


def existing(path: Path, what: str) -> Path:
    """The path, or an error that says which input is missing."""
    if not path.exists():
        raise CommandError(f"The {what} {path} does not exist.", "Check the path.")
    return path


def as_json(text: str) -> object:
    """0.2, 3, true, [1e-4] and the like as JSON; anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text
