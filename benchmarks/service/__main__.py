"""`make benchmark-service`, or `python -m benchmarks.service`: what the service costs.

Writes docs/results/service.json, and from it service.md. `--only PART` measures one part anew and leaves the others.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.figures import Figures, environment
from benchmarks.service import latency, load, page, streams, throughput, transfer, whole
from benchmarks.service.options import SMALL, Options

RESULTS: Final = Path(__file__).parents[2] / "docs" / "results"
Part = Callable[[Options, Figures, Path], None]
# Name -> what measures it. Its figures begin with its name.
PARTS: Final[dict[str, Part]] = {
    "latency": latency.run,
    "streams": streams.run,
    "throughput": throughput.run,
    "transfer": transfer.run,
    "whole": whole.run,
    "load": load.run,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write figures and page after each part. A part that fails does not keep the others from running.

    Raises:
        SystemExit: at the end, naming the parts that failed.
    """
    options = _options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that all of it ends with us
    path = options.out / "service.json"
    figures = Figures.read(path) if path.exists() else Figures()
    figures.environment = environment()
    failed = []
    for part in options.only or PARTS:
        began, fresh = time.monotonic(), Figures(figures.environment)
        with tempfile.TemporaryDirectory(prefix="seuf-service-") as folder:
            Path(folder).chmod(0o755)  # Postgres runs as a user of its own and must get to its data
            try:
                PARTS[part](SMALL if options.size == "small" else Options(), fresh, Path(folder) / part)
            except Exception:  # whatever it is, the other parts are worth having
                traceback.print_exc()
                failed.append(part)
                continue
        figures.drop((f"{part}/",))
        figures.take(fresh)
        figures.write(path)
        page.write(options.out, figures)
        sys.stdout.write(f"{part}: {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given again")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: for a test of itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures and the page")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
