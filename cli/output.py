"""What commands print: JSON for programs, tables and lines for people. Results go to stdout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """One JSON document a line."""
    typer.echo(json.dumps(value))


def say(text: str) -> None:
    """A line for people, on stderr, so that stdout stays the result."""
    typer.echo(text, err=True)


def console(*, err: bool = False) -> Console:
    """A rich console; loaded only when something is drawn."""
    from rich.console import Console

    return Console(stderr=err, highlight=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; cells that are numbers are set to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    cells = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], (int, float)) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if value is not None:
            typer.echo(f"{name:<{width}}  {value}")


def print_metrics(rows: Sequence[Mapping[str, Any]]) -> None:
    """The before/after table: one line per figure, stages side by side."""
    if not rows:
        say("Nothing was measured.")
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    stages.sort(key=lambda stage: (not stage.startswith("before"), "masked" in stage))
    figures: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        figures.setdefault((row["set"], row["domain"], row["name"]), {})[row["stage"]] = row
    lines = []
    for (which, domain, name), by_stage in sorted(figures.items()):
        some = next(iter(by_stage.values()))
        values = [_figure(by_stage[stage]["value"]) if stage in by_stage else "" for stage in stages]
        chance = "" if some["chance"] is None else _figure(some["chance"])
        lines.append([which, domain or "all", name, *values, chance, some["n"]])
    heads = ["masked" if stage.endswith("_masked") else stage for stage in stages]  # beside its stage
    print_table(["set", "domain", "figure", *heads, "chance", "n"], lines)


def experts(chosen: Iterable[Mapping[str, Any]]) -> str:
    """Selected experts, in a line."""
    return ", ".join(f"layer {one['layer']} expert {one['expert']}" for one in chosen)


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3f}"


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
