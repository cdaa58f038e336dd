"""`make chaos`, or `python -m benchmarks.chaos`: 100 jobs, at least 150 kills, nothing lost, nothing doubled.

Writes docs/results/chaos.json and chaos.md. The seed decides which faults come in which order, in which phase and how
far into it, and which jobs are cancelled; what they meet depends on the machine.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.chaos import page
from benchmarks.chaos.play import Played, play
from benchmarks.chaos.scene import say
from benchmarks.chaos.service import Lane
from benchmarks.figures import Figures, environment

RESULTS: Final = Path("docs") / "results"
KILLS_PER_JOB: Final = 1.6
SHARE_ON_CELERY: Final = 0.7


def main(arguments: list[str] | None = None) -> None:
    """Run it and write the figures.

    Raises:
        SystemExit: 1 when a rule was broken; what was written stays, for a look at it.
    """
    options = _options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that all of it ends with us
    folder = Path(tempfile.mkdtemp(prefix="seuf-chaos-"))
    folder.chmod(0o755)  # Postgres runs as a user of its own and must get to its data
    kills = options.kills if options.kills is not None else math.ceil(KILLS_PER_JOB * options.jobs)
    played: list[Played] = []
    for lane, share in _shares(options.lane).items():
        began = time.monotonic()
        say(
            f"== {lane} lane: {round(options.jobs * share)} jobs, {round(kills * share)} kills, seed {options.seed}"
        )
        rng = random.Random(f"{options.seed}/{lane}")
        one = play(
            lane, folder / lane, round(options.jobs * share), round(kills * share), rng, options.minutes * 60
        )
        played.append(one)
        for rule, what in one.verdict.breaches:
            say(f"BROKEN {rule}: {what}")
        say(f"== {lane} lane: {time.monotonic() - began:.0f} s, {len(one.verdict.breaches)} rules broken")
    figures = page.figures(environment(), options.seed, played)
    figures.write(options.out / "chaos.json")
    page.write(options.out, Figures.read(options.out / "chaos.json"))
    if any(one.verdict.breaches or one.left_processes for one in played):
        sys.exit(f"Rules were broken. Logs, database and storage: {folder}")
    shutil.rmtree(folder)


def _shares(lane: Lane | None) -> dict[Lane, float]:
    if lane is not None:
        return {lane: 1.0}
    return {"celery": SHARE_ON_CELERY, "database": 1 - SHARE_ON_CELERY}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100, help="of both lanes together")
    parser.add_argument("--kills", type=int, help=f"at least so many; default {KILLS_PER_JOB} a job")
    parser.add_argument("--seed", type=int, default=0, help="of faults and cancels")
    parser.add_argument("--lane", choices=("celery", "database"), help="this lane only")
    parser.add_argument("--minutes", type=float, default=20, help="a lane that takes longer has failed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures and the page")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
