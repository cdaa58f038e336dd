"""How far the default method gets on reference models of every kind: `python benchmarks/defaults.py`.

Two families, three degrees of specialisation, two seeds of the split into train, selection and test facts. Nothing is
given but the sets: experts and strength are found by the job. Beside each run stands its control, as many random
experts of the same layers. Figures of test facts go to docs/results/defaults.json and, as a table, to
docs/results/defaults.md; `--continue` takes finished cases from the JSON that is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import get_args

import transformers

from benchmarks import figures as measured
from seuf_core import Method, UnlearnResult, reference, unlearn
from seuf_core.errors import MethodError
from seuf_core.reference.architecture import Architecture, Size, Specialisation

RESULTS = Path(__file__).parent.parent / "docs" / "results"
FORGET = "chemistry"
# What the demo asks for: figures on test facts.
BOUNDS = {"choice": (0.15, 0.32), "open": (0, 0.03), "lost, mean": (-1, 0.05), "lost, worst": (-1, 0.07)}
PAGE = """# The default on every kind of reference model

Made by `make benchmark-defaults` from [defaults.json](defaults.json); change nothing here. Nothing was given but the
sets. Figures are of test facts; chance is .25. *Lost* is what the two kept domains lost, the worse of choice and open
answers: mean over both domains, and the worse domain. *Masked*: the unlearned model asked with its target experts
masked out of the routing. *Random*: choice with as many random experts of the same layers, at the rate that was
found. *Within* the demo's bounds: choice .15 to .32, open at most .03, lost at most .05 and .07.

| family | specialised | split | experts | changed | choice | open | lost, mean | worst | masked | random | s | within |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|
"""
Figures = dict[str, float]


def main() -> None:
    """Measure every case that is not there yet; write JSON and table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of defaults.json and defaults.md")
    parser.add_argument("--size", choices=get_args(Size), default="full", help="of the reference models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2], help="of the split")
    parser.add_argument("--continue", dest="going_on", action="store_true", help="keep what is measured")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    path = options.out / "defaults.json"
    figures = measured.Figures.read(path).values() if options.going_on and path.exists() else {}
    kinds = product(get_args(Architecture), get_args(Specialisation), options.seeds)
    for architecture, specialisation, seed in kinds:
        name = f"{architecture}/{specialisation}/{seed}"
        if f"{name}/choice" in figures:
            continue
        built = reference.build(architecture, specialisation, size=options.size)
        for figure, value in case(built, seed).items():
            figures[f"{name}/{figure}"] = value
        write(options.out, figures)
        sys.stdout.write(f"{name}: {_cells(name, figures)}\n")
        sys.stdout.flush()


def case(built: reference.Reference, seed: int) -> Figures:
    """The default on one model, and its control."""
    began = time.monotonic()
    result = run(built, Method(seed=seed))
    seconds = time.monotonic() - began
    # The control trains at the rate that was found, and is judged by the same rule.
    control = Method(
        seed=seed,
        scope="random_expert",
        experts=len(result.selection),
        learning_rate=result.chosen["learning_rate"],
    )
    figures = judged(result) | {
        "experts": len(result.selection),
        "parameters_changed_share": result.parameters_changed / result.parameters_total,
        "seconds": seconds,
    }
    try:
        figures["choice_random_experts"] = judged(run(built, control))["choice"]
    except MethodError as error:
        if error.code != "nothing_forgotten":
            raise
        figures["choice_random_experts"] = figures["choice_before"]
    return figures


def run(built: reference.Reference, method: Method) -> UnlearnResult:
    """A job without a checkpoint."""
    with tempfile.TemporaryDirectory() as work:
        return unlearn(
            built.model,
            built.forget,
            None,
            retain=built.retain,
            evaluation=built.probes,
            method=method,
            work=Path(work),
        )


def judged(result: UnlearnResult) -> Figures:
    """Test figures: the forget domain as it is, the others by what they lost (mean and worst over both)."""
    rows = {(row["stage"], row["domain"], row["name"]): row["value"] for row in result.metrics}
    kept = {domain for _, domain, _ in rows if domain != FORGET}

    def lost(name: str) -> list[float]:
        return [rows["before", domain, name] - rows["after", domain, name] for domain in kept]

    figures = {name: rows["after", FORGET, name] for name in ("choice", "open")}
    figures["choice_before"] = rows["before", FORGET, "choice"]
    if ("after_masked", FORGET, "choice") in rows:
        figures["choice_masked"] = rows["after_masked", FORGET, "choice"]
    for name in ("choice", "open"):
        figures[f"drop_{name}_mean"] = sum(lost(name)) / len(kept)
        figures[f"drop_{name}_worst"] = max(lost(name))
    return figures


def write(folder: Path, figures: Figures) -> None:
    """defaults.json and defaults.md."""
    units = {"experts": "experts", "seconds": "s"}
    rows = measured.Figures(measured.environment())
    for name, value in figures.items():
        rows.add(name, value, units.get(name.rsplit("/", 1)[1], "share"))
    rows.write(folder / "defaults.json")
    (folder / "defaults.md").write_text(table(figures))


def table(figures: Figures) -> str:
    """The page: a row a case."""
    cases = dict.fromkeys(name.rsplit("/", 1)[0] for name in figures)
    return PAGE + "\n".join(_row(name, figures) for name in cases) + "\n"


def _row(name: str, figures: Figures) -> str:
    family, specialisation, seed = name.split("/")
    return f"| {family} | {specialisation} | {seed} | {_cells(name, figures)} |"


def _cells(name: str, figures: Figures) -> str:
    mean, worst = (
        max(figures[f"{name}/drop_{kind}_{what}"] for kind in ("choice", "open"))
        for what in ("mean", "worst")
    )
    choice, opened = figures[f"{name}/choice"], figures[f"{name}/open"]
    shown = {"choice": choice, "open": opened, "lost, mean": mean, "lost, worst": worst}
    past = [kind for kind, value in shown.items() if not BOUNDS[kind][0] <= value <= BOUNDS[kind][1]]
    cells = [
        f"{figures[f'{name}/experts']:.0f}",
        f"{figures[f'{name}/parameters_changed_share']:.1%}",
        *(_three(value) for value in (choice, opened, mean, worst)),
        *(_three(figures.get(f"{name}/{kind}")) for kind in ("choice_masked", "choice_random_experts")),
        f"{figures[f'{name}/seconds']:.0f}",
        "yes" if not past else "no: " + ", ".join(past),
    ]
    return " | ".join(cells)


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
