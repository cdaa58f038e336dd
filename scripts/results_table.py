"""Write the README's tables from docs/results/demo.json and performance.json, so that they cannot say anything else.

python scripts/results_table.py          # writes
python scripts/results_table.py --check  # exit code 1 when a table is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.glance import readme_table

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "docs" / "results", ROOT / "README.md"
END = "<!-- end of table -->"
COLUMNS = {
    "base": "base",
    "unlearned": "**unlearned**",
    "unlearned_masked": "masked",
    "random_expert": "random experts",
    "full_model": "whole model",
    "twin": "retrained twin",
}
ROWS = [
    (measure, domain) for measure in ("choice", "open") for domain in ("chemistry", "geography", "persons")
]


def demo() -> str:
    """What the demo's job did, as a Markdown table."""
    rows = json.loads((RESULTS / "demo.json").read_text())["figures"]
    figures = {figure["name"]: figure["value"] for figure in rows}
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for measure, domain in ROWS:
        name = f"{measure}, {domain}" + (" (to forget)" if domain == "chemistry" else "")
        cells = [figures.get(f"{measure}/{domain}/{column}") for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in cells) + " |")
    for label, name, form in (
        ("parameters changed", "parameters_changed_share", "{:.1%}"),
        ("seconds of the job", "seconds_job", "{:.0f}"),
    ):
        values = {"unlearned": figures[name]} | {
            c: figures.get(f"{name}/{c}") for c in ("random_expert", "full_model")
        }
        cells = ["" if values.get(c) is None else form.format(values[c]) for c in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", past_the_bound(figures)])


def past_the_bound(figures: dict[str, float]) -> str:
    """How far the two controls got when the bound on what is kept is ignored."""
    whole, rest = (figures[f"lowest/{name}/full_model"] for name in ("forget_choice", "retain_drop"))
    random, lost = (figures[f"lowest/{name}/random_expert"] for name in ("forget_choice", "retain_drop"))
    return (
        f"Past the bound, on selection facts, the whole model got down to {whole:.2f} and had lost {rest:.2f} of what "
        f"is kept; random experts got to {random:.2f} and had lost {lost:.2f}."
    )


def speed() -> str:
    """How fast it is, as a Markdown table."""
    return readme_table(Figures.read(RESULTS / "performance.json"))


def page() -> str:
    """The README with the tables of today."""
    text = README.read_text()
    for name, table in (("table", demo()), ("speed", speed())):
        begin = f"<!-- {name}: python scripts/results_table.py -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}"
    return text


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(README.read_text() != page())
    README.write_text(page())
