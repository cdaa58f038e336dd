"""How fast unlearning is and how little it takes: `make benchmark-speed`, or `python -m benchmarks.speed`.

Writes docs/results/performance.json, and from it performance.md with its plots. Every cell is written as soon as it
is measured; `--continue` measures only what is not there, `--only PART` one part, anew. On a GPU the files are
called performance-gpu.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

from benchmarks import attribution, jobs, page, plan, scaling, steps, writing
from benchmarks.figures import Figures, environment
from benchmarks.setting import Setting, Size

SHAPES: Final = Path("build") / "shapes"


def _plans(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Actual over plan of every case in benchmarks.plan."""
    if figures.names("plan/"):
        return
    for number, row in enumerate(plan.jobs_against_plans(setting), start=1):
        case, found = row["case"], row["comparison"]
        prefix = f"plan/{number}/{case['shape']}/{case['objective']}/{row['plan']['residency']}"
        figures.add(f"{prefix}/memory", found["memory"], "ratio")
        figures.add(f"{prefix}/seconds", found["seconds"], "ratio")
    save()


# Name -> what measures it. Its figures begin with its name; those of `steps` with `memory` too.
PARTS: Final[dict[str, Callable[[Setting, Figures, Callable[[], None]], None]]] = {
    "steps": steps.run,
    "attribution": attribution.run,
    "writing": writing.run,
    "jobs": jobs.run,
    "scaling": scaling.run,
    "plan": _plans,
}
PREFIXES: Final = {part: (f"{part}/", "memory/") if part == "steps" else (f"{part}/",) for part in PARTS}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write figures and page after each cell. A part that fails does not keep the others from running.

    Raises:
        SystemExit: at the end, naming the parts that failed.
    """
    options = _options(arguments)
    options.shapes.mkdir(parents=True, exist_ok=True)
    names = tuple(options.shape or Setting.shapes)
    objectives = tuple(options.objective or Setting.objectives)
    setting = Setting(options.shapes, names, options.size, options.rounds, objectives)
    here = environment()
    path = options.out / f"{page.stem(here)}.json"
    figures = Figures.read(path) if path.exists() else Figures()
    figures.environment = here
    failed: list[str] = []
    for part in options.only or PARTS:
        if not options.going_on:
            figures.drop(PREFIXES[part])
        began = time.monotonic()

        def save() -> None:
            figures.write(path)
            page.write(options.out, figures)

        try:
            PARTS[part](setting, figures, save)
        except Exception:  # whatever it is, the other parts take an hour and are worth having
            traceback.print_exc()
            failed.append(part)
        save()
        sys.stdout.write(f"{part}: {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given again")
    parser.add_argument("--continue", dest="going_on", action="store_true", help="keep what is measured")
    parser.add_argument("--shape", action="append", help="of benchmarks.shapes; may be given again")
    parser.add_argument(
        "--objective", choices=Setting.objectives, action="append", help="of the steps; may be given again"
    )
    parser.add_argument(
        "--size", choices=get_args(Size), default="full", help="small: tiny models, for a test"
    )
    parser.add_argument("--rounds", type=int, default=Setting.rounds, help="turns of each variant at most")
    parser.add_argument("--out", type=Path, default=page.RESULTS, help="folder of the figures and the page")
    parser.add_argument(
        "--shapes", type=Path, default=SHAPES, help="folder of the checkpoints; they stay there"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
