"""Plans against what jobs did: memory and seconds of different jobs, each in a fresh process.

python -m benchmarks.plan build/shapes build/plan.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import Objective, Router, Setting, method_of, texts, write_probes, write_texts
from seuf_core.method import Attribution, Method, Scope

# What a plan may be off by: a fifth of memory, half as much time again.
MEMORY, SECONDS = 0.2, 1.5


@dataclass(frozen=True)
class Case:
    """One job: a shape, a loss, how many texts of how many tokens, and the memory it may use ("" = what is free).

    seed: of the split and the batches, and so of what is forgotten and which expert serves it.
    """

    shape: str
    objective: Objective
    seed: int
    examples: int = 16
    length: int = 32
    steps: int = 4
    memory: str = ""
    router: Router = "freeze"
    batch_size: int = 4
    scope: Scope = "seuf"
    attribution: Attribution = "affinity"


CASES: Final[tuple[Case, ...]] = (
    Case("olmoe-125m", "rmu", 0, steps=16),
    Case("olmoe-125m", "npo", 1, examples=32, length=64),
    Case("olmoe-125m", "gradient_difference", 2, batch_size=16),
    Case("olmoe-125m", "npo", 3, memory="600MB"),
    Case("olmoe-125m", "gradient_difference", 4, router="train"),
    Case("olmoe-125m", "npo", 5, memory="800MB", examples=32),
    Case("qwen2-moe-1b", "rmu", 5),
    Case("qwen2-moe-1b", "npo", 6),
    Case("qwen2-moe-1b", "gradient_difference", 7, length=64),
    Case("qwen2-moe-1b", "rmu", 8, memory="1500MB", steps=12),
    Case("qwen2-moe-1b", "npo", 9, memory="1900MB"),
    Case("qwen2-moe-1b", "gradient_difference", 1, memory="1100MB", steps=2),
    Case("qwen2-moe-1b", "npo", 2, router="train", batch_size=8),
    Case("olmoe-125m", "npo", 3, examples=32, length=64, scope="lora"),
    Case("olmoe-125m", "npo", 3, examples=32, length=64, attribution="gradient"),
)


def method_for(case: Case) -> Method:
    """The method of a case: one run of fixed strength that trains one expert, or adapters."""
    changed = {
        "scope": case.scope,
        "attribution": case.attribution,
        "seed": case.seed,
        "batch_size": case.batch_size,
        "max_length": case.length,
    }
    made = method_of(case.objective, router=case.router, steps=case.steps)
    return made.model_copy(update=changed)


def run_case(setting: Setting, case: Case) -> dict[str, Any]:
    """One job in this process: the plan that was made for its targets, and what happened."""
    from seuf_core import unlearn
    from seuf_core.observer import Silent

    class Heard(Silent):
        """Keeps the last plan."""

        data: dict[str, Any]

        def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
            if type == "plan":
                self.data = data

    heard, folder, vocabulary = Heard(), setting.checkpoint(case.shape), setting.vocabulary(case.shape)
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        here = Path(scratch)
        sets = [
            write_texts(here / f"{seed}.jsonl", texts(vocabulary, case.examples, case.length, seed))
            for seed in (1, 2)
        ]
        unlearn(
            folder,
            sets[0],
            here / "out",
            retain=sets[1],
            evaluation=write_probes(here / "probes.jsonl", vocabulary),
            method=method_for(case),
            work=here / "work",
            observer=heard,
            memory=case.memory or None,
        )
    return {"case": case.__dict__, **heard.data}


def jobs_against_plans(setting: Setting, cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """Every case in a fresh process; rows {case, plan, actual, comparison}."""
    rows = []
    for case in cases:
        setting.checkpoint(case.shape)
        asked = json.dumps(
            {"case": case.__dict__, "folder": str(setting.folder.absolute()), "size": setting.size}
        )
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan", "--one", asked],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def within(row: dict[str, Any]) -> bool:
    """Whether a plan was as good as plans must be."""
    found = row["comparison"]
    memory, seconds = found["memory"], found["seconds"]
    return bool(1 - MEMORY <= memory <= 1 + MEMORY and 1 / SECONDS <= seconds <= SECONDS)


def _main(arguments: list[str]) -> None:
    if arguments[0] == "--one":
        asked = json.loads(arguments[1])
        setting = Setting(Path(asked["folder"]), size=asked["size"])
        print(json.dumps(run_case(setting, Case(**asked["case"]))))
        return
    folder, out = map(Path, arguments)
    rows = jobs_against_plans(Setting(folder))
    out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        found = row["comparison"]
        print(row["case"], row["plan"]["residency"], found["memory"], found["seconds"], within(row))


if __name__ == "__main__":
    _main(sys.argv[1:])
