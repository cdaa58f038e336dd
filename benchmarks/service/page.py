"""docs/results/service.md, made from the figures and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.figures import Figures, markdown_table
from benchmarks.units import size

INTRODUCTION: Final = """# What the service costs

Made by `make benchmark-service` from [service.json](service.json); change nothing here. One part alone:
`make benchmark-service ARGS="--only latency"`. Every ratio is of one run in which both sides take turns on the same
machine; figures are medians over repeats. How each is measured stands at the head of its file in
`benchmarks/service/`.

Machine: {environment}.
"""

# Goal -> figure, the most or least it may be, and its unit as it is shown.
GOALS: Final[tuple[tuple[str, str, str, float], ...]] = (
    ("p99 of GET /jobs/{id} over a bare endpoint's, Postgres", "latency/postgres/get/ratio_p99", "<=", 1.5),
    ("the same, SQLite", "latency/sqlite/get/ratio_p99", "<=", 1.5),
    ("p99 of POST /jobs over a bare endpoint's, Postgres", "latency/postgres/post/ratio_p99", "<=", 2.0),
    ("the same, SQLite", "latency/sqlite/post/ratio_p99", "<=", 2.0),
    ("watchers of one process that get every event", "streams/watchers", ">=", 500),
    ("download over nginx", "transfer/download/ratio", ">=", 0.7),
    ("seconds from claim to the method's first sign of life", "whole/claim_to_phase", "<=", 1.0),
)


def write(folder: Path, figures: Figures) -> None:
    """The page."""
    (folder / "service.md").write_text(text(figures))


def text(figures: Figures) -> str:
    """Goals first, then a table a part."""
    shown = ", ".join(f"{name} {value}" for name, value in figures.environment.items())
    parts = [INTRODUCTION.format(environment=shown).rstrip()]
    for title, made in (("Goals", _goals(figures)), *((t, _table(figures, p)) for p, t in SECTIONS.items())):
        if made:
            parts += [f"## {title}", made]
    return "\n\n".join(parts) + "\n"


SECTIONS: Final = {
    "latency/": "Latency beside a bare FastAPI + SQLAlchemy endpoint",
    "streams/": "Event streams",
    "throughput/": "Jobs of no work beside Celery tasks of no work",
    "transfer/": "Uploads and downloads",
    "whole/": "A whole job beside `seuf run`",
    "load/": "Everything at once",
}


def _goals(figures: Figures) -> str:
    rows = []
    for what, name, sign, goal in GOALS:
        found = figures.get(name)
        if found is not None:
            met = found <= goal if sign == "<=" else found >= goal
            rows.append([what, f"{found:.3g}", f"{sign} {goal:g}", "yes" if met else "no"])
    seconds, run = figures.get("whole/service/seconds"), figures.get("whole/run/seconds")
    if seconds is not None and run is not None:
        allowed, over = 2 + 0.05 * run, seconds - run
        met_here = "yes" if over <= allowed else "no"
        rows.append(["seconds of the service on a whole job", f"{over:.1f}", f"<= {allowed:.1f}", met_here])
    for kind in ("postgres", "sqlite"):
        unchanged, get = (figures.get(f"latency/{kind}/{what}/ours/p50") for what in ("unchanged", "get"))
        if unchanged is not None and get is not None:
            what = f"conditional GET over GET, {kind}"
            rows.append([what, f"{unchanged / get:.2f}", "< 1", "yes" if unchanged < get else "no"])
    return markdown_table(("goal", "measured", "wanted", "met"), rows) if rows else ""


def _table(figures: Figures, prefix: str) -> str:
    units = figures.units()
    rows = [
        [name.removeprefix(prefix).replace("/", ", ").replace("_", " "), _shown(figures[name], units[name])]
        for name in figures.names(prefix)
    ]
    return markdown_table(("", "measured"), rows) if rows else ""


SHOWN: Final[dict[str, Callable[[float], str]]] = {
    "s": lambda value: f"{value * 1000:.2f} ms" if value < 1 else f"{value:.1f} s",
    "1/s": lambda value: f"{value:.3g} a second",
    "bytes": size,
    "bytes/s": lambda value: f"{value / 1e6:.0f} MB/s",
    "ratio": lambda value: f"{value:.2f}",
    "share": lambda value: f"{value:.1%}",
}


def _shown(value: float, unit: str) -> str:
    return SHOWN[unit](value) if unit in SHOWN else f"{value:,.0f}"
