"""The figures of chaos, and docs/results/chaos.md made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from benchmarks.chaos.play import Played
from benchmarks.chaos.verdict import RULES
from benchmarks.figures import Figures, markdown_table

KINDS: Final = ("engine", "worker", "api", "dispatcher")
HEAD: Final = """# Nothing is lost when processes die

Made by `make chaos` from [chaos.json](chaos.json); change nothing here. `make chaos ARGS="--jobs 20 --seed 3"` is a
shorter run with other faults.

Real jobs on a small trained Mixture-of-Experts model (`seuf_core.reference`, size tiny), sent over HTTP to a real
service: API, two workers with their engines and, on the celery lane, a dispatcher, a Postgres and a Redis of their
own; on the database lane SQLite. A lease takes {lease} seconds. While jobs run, processes get SIGKILL in moments that
the seed draws; they are started again as systemd or Docker would. Locks in the database hold a program in moments that
chance would seldom hit: between commit and publish, between publish and its mark, between the bytes of a result and
their row. Between kills, workers are stopped (SIGSTOP) past their lease and continued, Redis loses all messages,
Postgres is restarted and killed, the disk is full, the receiver of webhooks is down, uploads are cut off, and jobs are
cancelled in every phase.

At the end every job must have ended once and rightly; its events must be numbered without gaps; each result must have
its row and each row its bytes, with the sums of its manifest; and the changed weights of each completed job must be,
bit for bit, those of a run that nobody disturbed.
"""
BROKEN: Final[Mapping[str, str]] = {
    "lost": "jobs, results or bytes lost",
    "doubled": "jobs, results or ends doubled",
    "wrong_state": "wrong final states",
    "other_weights": "completed jobs with other weights",
    "orphans": "bytes without a row after the sweep",
    "untold": "changes of state that no webhook told",
    "unsettled": "leases or messages left over",
}


def figures(environment: Mapping[str, Any], seed: int, played: Sequence[Played]) -> Figures:
    """Every figure of a run."""
    found = Figures(environment)
    found.add("seed", seed, "seed")
    found.add("jobs", sum(one.jobs for one in played), "jobs")
    found.add("kills", sum(sum(done.kill is not None for done in one.done) for one in played), "kills")
    for rule in RULES:
        found.add(rule, sum(one.verdict.count(rule) for one in played), "breaches")
    found.add("compared", sum(one.verdict.compared for one in played), "checkpoints")
    found.add("left_processes", sum(one.left_processes for one in played), "processes")
    for one in played:
        _lane(found, one)
    return found


def _lane(found: Figures, one: Played) -> None:
    lane, attempts = one.lane, one.verdict.attempts
    found.add(f"{lane}/jobs", one.jobs, "jobs")
    for status, count in sorted(one.verdict.ended.items()):
        found.add(f"{lane}/ended/{status}", count, "jobs")
    for kind in KINDS:
        phases = Counter(done.phase for done in one.done if done.kill == kind)
        for phase, count in sorted(phases.items()):
            found.add(f"{lane}/kills/{kind}/{phase}", count, "kills")
    for name, count in sorted(Counter(done.name for done in one.done if done.kill is None).items()):
        found.add(f"{lane}/troubles/{name}", count, "times")
    for phase, count in sorted(one.cancelled.items()):
        found.add(f"{lane}/cancelled_in/{phase}", count, "jobs")
    found.add(f"{lane}/recoveries", sum(attempts) - len([a for a in attempts if a]), "attempts")
    found.add(f"{lane}/attempts/mean", mean(attempts) if attempts else 0.0, "attempts")
    found.add(f"{lane}/attempts/most", max(attempts, default=0), "attempts")
    found.add(f"{lane}/sent_again", one.resubmits, "submits")
    found.add(f"{lane}/fell_by_themselves", sum(one.fallen.values()), "times")
    found.add(f"{lane}/seconds", one.seconds, "s")
    found.add(f"{lane}/disk_could_be_filled", int(one.own_disk), "0 or 1")


def write(folder: Path, figures: Figures) -> None:
    """The page beside the figures."""
    (folder / "chaos.md").write_text(text(figures), encoding="utf-8")


def text(figures: Figures) -> str:
    """The page."""
    lanes = [lane for lane in ("celery", "database") if f"{lane}/jobs" in figures]
    machine = ", ".join(f"{key} {value}" for key, value in figures.environment.items())
    seconds = sum(figures[f"{lane}/seconds"] for lane in lanes)
    parts = [
        HEAD.format(lease="3"),
        f"Machine: {machine}. Seed {figures['seed']:.0f}. {seconds / 60:.0f} minutes under faults.\n",
        _outcome(figures),
        _kills(figures, lanes),
        _table(figures, lanes, "Cancelled", "cancelled_in", "jobs cancelled while"),
        _table(figures, lanes, "Other troubles", "troubles", "trouble"),
        _recovery(figures, lanes),
    ]
    return "\n".join(parts)


def _outcome(figures: Figures) -> str:
    rows = [(name, f"{figures[rule]:.0f}") for rule, name in BROKEN.items()]
    rows.append(("processes left behind", f"{figures['left_processes']:.0f}"))
    jobs, kills, compared = (f"{figures[name]:.0f}" for name in ("jobs", "kills", "compared"))
    head = f"## {jobs} jobs, {kills} kills\n\n{compared} checkpoints were compared with undisturbed ones.\n\n"
    return head + markdown_table(("rule", "broken"), rows) + "\n"


def _kills(figures: Figures, lanes: Sequence[str]) -> str:
    rows = []
    for kind in KINDS:
        phases = {name.split("/")[-1] for lane in lanes for name in figures.names(f"{lane}/kills/{kind}/")}
        for phase in sorted(phases):
            counts = [figures.get(f"{lane}/kills/{kind}/{phase}") for lane in lanes]
            rows.append((f"{kind}: {phase}", *_cells(counts)))
    return f"## Kills\n\n{markdown_table(('victim and phase of its job', *lanes), rows)}\n"


def _table(figures: Figures, lanes: Sequence[str], title: str, part: str, first: str) -> str:
    names = {name.split("/", 2)[2] for lane in lanes for name in figures.names(f"{lane}/{part}/")}
    rows = [
        (name, *_cells([figures.get(f"{lane}/{part}/{name}") for lane in lanes])) for name in sorted(names)
    ]
    return f"## {title}\n\n{markdown_table((first, *lanes), rows)}\n"


def _recovery(figures: Figures, lanes: Sequence[str]) -> str:
    shown = {
        "ended/succeeded": "jobs succeeded",
        "ended/cancelled": "jobs cancelled",
        "ended/failed": "jobs failed for a full disk, and retried",
        "recoveries": "attempts after the first",
        "attempts/mean": "attempts a job, mean",
        "attempts/most": "attempts a job, most",
        "sent_again": "submits that had to be repeated",
        "fell_by_themselves": "programs that fell by themselves",
        "seconds": "seconds under faults",
    }
    rows = [
        (label, *_cells([figures.get(f"{lane}/{name}") for lane in lanes])) for name, label in shown.items()
    ]
    return f"## Recovery\n\n{markdown_table(('what', *lanes), rows)}\n"


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.3g}" if value % 1 else f"{value:.0f}" for value in values]
