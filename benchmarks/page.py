"""docs/results/performance.md and its plots, made from the figures and nothing else.

python -m benchmarks.page    # writes them again, of every device that was measured on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import glance
from benchmarks.figures import Figures, markdown_table
from benchmarks.plots import bars_svg, lines_svg
from benchmarks.prose import INTRODUCTION, SECTIONS
from benchmarks.units import percent, seconds, share, size, times

RESULTS: Final = Path(__file__).parent.parent / "docs" / "results"
# An exponent is fitted to medians of a machine that does other things too.
EXPONENT_SLACK: Final = 0.1
UNITS: Final = ("seconds", "bytes")


def stem(environment: Mapping[str, Any]) -> str:
    """Name of the files without their ending: a GPU's figures are a page of their own."""
    return "performance" if environment.get("device", "cpu") == "cpu" else "performance-gpu"


def write(folder: Path, figures: Figures) -> None:
    """The page and every plot for which there are figures; a plot for which there are none any more goes."""
    name, pictures = stem(figures.environment), plots(figures)
    for key in SECTIONS:
        picture = folder / f"{name}-{key}.svg"
        if key in pictures:
            picture.write_text(pictures[key])
        else:
            picture.unlink(missing_ok=True)
    (folder / f"{name}.md").write_text(text(figures))


def text(figures: Figures) -> str:
    """The page."""
    name, pictures = stem(figures.environment), plots(figures)
    parts = [INTRODUCTION.format(name=name, environment=_environment(figures.environment)).rstrip()]
    for key, (title, prose) in SECTIONS.items():
        if made := TABLES[key](figures):
            parts += [f"## {title}", prose.strip(), made]
            parts += [f"![{title}]({name}-{key}.svg)"] if key in pictures else []
    return "\n\n".join(parts) + "\n"


def plots(figures: Figures) -> dict[str, str]:
    """Section -> SVG."""
    made = {}
    factors = {
        f"{shape}, {objective}, {labels}, {place}": figures[f"{prefix}/n1"] / figures[f"{prefix}/ours"]
        for prefix, (shape, objective, place, router, labels) in _cells(figures)
        if router == "freeze"
    }
    if factors:
        made["steps"] = bars_svg("Steps per second, ours over the careful naive way", factors)
    if panels := _scaling_panels(figures):
        made["scaling"] = lines_svg("Seconds as one size is doubled, relative to the smallest", panels)
    return made


def _environment(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def _cells(figures: Figures) -> list[tuple[str, tuple[str, ...]]]:
    """steps/<shape>/<objective>/<place>/<router>/<labels> of each cell, and its parts."""
    prefixes = [name.removesuffix("/ours") for name in figures.names("steps/") if name.endswith("/ours")]
    return [(prefix, tuple(prefix.split("/")[1:])) for prefix in prefixes]


def _steps(figures: Figures) -> str:
    rows = []
    for prefix, (shape, objective, place, router, labels) in _cells(figures):
        ours, n1, n0, floor = (figures.get(f"{prefix}/{way}") for way in ("ours", "n1", "n0", "floor"))
        assert ours is not None
        flops = figures.get(f"{prefix}/floor_flops")
        rows.append(
            [
                f"{shape}, {objective}, {labels}, {place}{', router trained' if router == 'train' else ''}",
                *(seconds(value) for value in (n0, n1, ours)),
                *(times(value and value / ours) for value in (n0, n1)),
                share(floor and floor / ours),
                f"{flops / floor / 1e9:.0f}" if flops and floor else "",
                seconds(figures.get(f"{prefix}/prepare")),
            ]
        )
    columns = (
        "job",
        "N0 s",
        "N1 s",
        "ours s",
        "over N0",
        "over N1",
        "of the floor",
        "floor GFLOP/s",
        "constants s",
    )
    return markdown_table(columns, rows) if rows else ""


def _memory(figures: Figures) -> str:
    jobs = dict.fromkeys(name.rsplit("/", 1)[0] for name in figures.names("memory/"))
    rows = [
        [
            ", ".join(job.split("/")[1:]),
            *(size(figures.get(f"{job}/{way}")) for way in ("n0", "n1", "ours")),
        ]
        for job in jobs
    ]
    return markdown_table(("job", "N0", "N1", "ours"), rows) if rows else ""


def _attribution(figures: Figures) -> str:
    rows = []
    for way in dict.fromkeys(name.rsplit("/", 1)[0] for name in figures.names("attribution/")):
        _, shape, kind = way.split("/")
        rows.append(
            [
                f"{shape}, {kind}",
                f"{figures[f'{way}/tokens_per_second']:.0f}",
                size(figures.get(f"{way}/peak_anonymous")),
                size(figures.get(f"{way}/peak_resident")),
                f"{figures[f'{way}/batch']:.0f}" if f"{way}/batch" in figures else "",
            ]
        )
    columns = ("model", "tokens/s", "anonymous", "with mapped files", "best batch, tokens")
    return markdown_table(columns, rows) if rows else ""


def _writing(figures: Figures) -> str:
    rows = []
    for way in dict.fromkeys(name.rsplit("/", 1)[0] for name in figures.names("writing/")):
        _, shape, kind = way.split("/")
        rows.append(
            [
                f"{shape}, {kind}",
                seconds(figures.get(f"{way}/seconds")),
                seconds(figures.get(f"{way}/durable")),
                size(figures.get(f"{way}/bytes")),
                size(figures.get(f"{way}/anonymous")),
                times(figures.get(f"{way}/times")),
                percent(figures.get(f"{way}/share")),
            ]
        )
    columns = ("way", "s", "s to the disk", "written", "memory", "over save_pretrained", "of the model")
    return markdown_table(columns, rows) if rows else ""


def _jobs(figures: Figures) -> str:
    rows = []
    for name in figures.names("jobs/"):
        if not name.endswith("/ours/seconds"):
            continue
        job = name.removesuffix("/ours/seconds")
        ours, naive = figures[name], figures.get(f"{job}/naive/seconds")
        _, shape, objective, place, memory = job.split("/")
        phases = ("attributing", "unlearning", "evaluating", "publishing")
        rows.append(
            [
                f"{shape}, {objective}, {place}{'' if memory == 'free' else f', in {memory}'}",
                f"{figures[f'{job}/steps']:.0f}",
                *(seconds(value) for value in (naive, ours)),
                times(naive and naive / ours),
                *(size(figures.get(f"{job}/{way}/peak_anonymous")) for way in ("naive", "ours")),
                ", ".join(chosen.rsplit("/", 1)[1] for chosen in figures.names(f"{job}/residency/")),
                ", ".join(seconds(figures.get(f"{job}/ours/{phase}")) or "0" for phase in phases),
            ]
        )
    columns = (
        "job",
        "steps",
        "naive s",
        "ours s",
        "times",
        "naive memory",
        "ours memory",
        "in memory",
        "ours by phase, s",
    )
    return markdown_table(columns, rows) if rows else ""


def _scaling(figures: Figures) -> str:
    rows = []
    for name in figures.names("scaling/"):
        if not name.endswith("/seconds_exponent"):
            continue
        prefix = name.removesuffix("/seconds_exponent")
        _, axis, what = prefix.split("/")
        cells, within = [], True
        for unit in UNITS:
            found, said = (figures[f"{prefix}/{unit}_{kind}"] for kind in ("exponent", "arithmetic"))
            cells += [f"{found:.2f}", f"{said:.2f}"]
            within &= found <= said + EXPONENT_SLACK
        rows.append([f"{what.replace('_', ' ')} against {axis}", *cells, "yes" if within else "no"])
    columns = ("", "seconds", "at most", "bytes", "at most", "within")
    return markdown_table(columns, rows) if rows else ""


def _scaling_panels(figures: Figures) -> dict[str, dict[str, list[tuple[float, float]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in figures.names("scaling/"):
        _, axis, what, *rest = name.split("/")
        if len(rest) == 2 and rest[1] == "seconds":
            line = panels.setdefault(axis, {}).setdefault(what.replace("_", " "), [])
            line.append((float(rest[0]), figures[name]))
    return panels


def _plan(figures: Figures) -> str:
    jobs = dict.fromkeys(name.rsplit("/", 1)[0] for name in figures.names("plan/"))
    rows = [
        [", ".join(job.split("/")[1:]), f"{figures[f'{job}/memory']:.2f}", f"{figures[f'{job}/seconds']:.2f}"]
        for job in jobs
    ]
    return (
        markdown_table(("job", "memory, actual over plan", "seconds, actual over plan"), rows) if rows else ""
    )


TABLES: Final[dict[str, Callable[[Figures], str]]] = {
    "glance": glance.table,
    "steps": _steps,
    "memory": _memory,
    "attribution": _attribution,
    "writing": _writing,
    "jobs": _jobs,
    "scaling": _scaling,
    "plan": _plan,
}


if __name__ == "__main__":
    for measured in RESULTS.glob("performance*.json"):
        write(RESULTS, Figures.read(measured))
