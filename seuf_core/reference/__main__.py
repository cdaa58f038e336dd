"""`python -m seuf_core.reference`: build a reference model with a progress bar and print its report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from seuf_core.errors import SeufError
from seuf_core.reference import Reference, build
from seuf_core.reference.architecture import Architecture, Size, Specialisation


def main() -> int:
    arguments = _parser().parse_args()
    disable_progress_bar()  # transformers shows one for every file
    try:
        reference = _build_with_bar(arguments)
    except SeufError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(reference.report, indent=2))
    print(reference.folder)
    return 0


def _build_with_bar(arguments: argparse.Namespace) -> Reference:
    columns = (
        *Progress.get_default_columns()[:-1],
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"))
        return build(
            **vars(arguments),
            progress=lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss),
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seuf_core.reference", description=__doc__)
    parser.add_argument("--architecture", choices=get_args(Architecture), default="qwen2_moe")
    parser.add_argument("--specialisation", choices=get_args(Specialisation), default="moderate")
    parser.add_argument("--size", choices=get_args(Size), default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--twin", action="store_true", help="train without the forget domain")
    parser.add_argument("--cache", type=Path, default=None, help="folder to build in instead of the cache")
    return parser


if __name__ == "__main__":
    sys.exit(main())
