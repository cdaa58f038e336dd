"""One lane from its start to its verdict: undisturbed runs, then jobs under faults, then rest."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from benchmarks.chaos import faults, orders, troubles, weights
from benchmarks.chaos.keeper import marked
from benchmarks.chaos.orders import SPECS, Ledger, Order
from benchmarks.chaos.scene import Done, Scene, say
from benchmarks.chaos.service import Lane, Service, service
from benchmarks.chaos.verdict import Verdict, at_rest, checkpoint_folder, judge
from store.transitions import Status
from worker import sweeps

CANCELLED_SHARE = 0.14
"""Of the jobs: two in each phase when there are a hundred."""
REST_SECONDS = 100.0
"""What leases, messages, webhooks and sweeps are given to settle after the last job has ended: a webhook whose sender
was killed is taken up by another one half a minute later."""
MAX_GAP_SECONDS = 2.5
"""Between two kills, beside the time each waits for its moment."""
AHEAD = 4
"""Jobs that wait or run while the next kill is due."""
TROUBLE_EVERY = 9
"""Kills between two troubles."""


@dataclass
class Played:
    """What happened on one lane."""

    lane: Lane
    jobs: int
    done: list[Done]
    verdict: Verdict
    cancelled: Counter[str]
    seconds: float
    undisturbed_seconds: float
    resubmits: int
    fallen: dict[str, int]
    own_disk: bool
    left_processes: int = 0
    undisturbed: dict[str, str] = field(default_factory=dict)


def play(
    lane: Lane,
    folder: Path,
    jobs: int,
    kills: int,
    rng: random.Random,
    seconds: float,
    specs: Sequence[str] = tuple(SPECS),
) -> Played:
    """So many jobs and kills. `specs`: which of SPECS, in turn.

    Raises:
        TimeoutError: when it has not ended after so many seconds.
    """
    with service(lane, folder) as running:
        inputs = orders.upload(running, folder / "reference")
        began = time.monotonic()
        calm = Ledger(running, inputs, [Order(n, name) for n, name in enumerate(specs)], "undisturbed")
        _finish(Scene(running, calm, rng), seconds)
        undisturbed = _digests(running, calm)
        calm_seconds = time.monotonic() - began
        say(
            f"{calm_seconds:6.1f} s  undisturbed: {', '.join(f'{k} {v[:8]}' for k, v in undisturbed.items())}"
        )
        drawn = orders.draw(jobs, rng, specs, cancels=math.ceil(CANCELLED_SHARE * jobs))
        ledger = Ledger(running, inputs, drawn, "chaos")
        scene = Scene(running, ledger, rng)
        ledger.may_submit = lambda number: number < _due(scene, jobs, kills)
        _strike(scene, kills, seconds)
        ledger.may_submit = lambda _: True
        _finish(scene, seconds - scene.seconds())
        took = scene.seconds()
        scene.until(lambda: _settled(running, drawn, undisturbed), REST_SECONDS)
        result = Played(
            lane,
            jobs,
            scene.done,
            judge(running, drawn, "chaos", undisturbed),
            Counter(order.cancelled_in for order in drawn if order.cancelled_in),
            took,
            calm_seconds,
            ledger.resubmits,
            running.keeper.fallen,
            running.has_own_disk,
            undisturbed=undisturbed,
        )
        if result.verdict.breaches:  # its disk goes with the service
            shutil.copytree(running.disk, folder / "kept", symlinks=True, dirs_exist_ok=True)
    left = list(marked(running.keeper.mark))
    result.left_processes = len(left)
    return result


def _due(scene: Scene, jobs: int, kills: int) -> float:
    """How many jobs have come by now: as many as the kills that have been done, and some ahead, so that all kills meet
    a service at work; and one when nothing is left to do, unless it is one of the last."""
    due = AHEAD + scene.kills / kills * max(0, jobs - AHEAD)
    idle = not scene.ledger.open and scene.ledger.submitted < jobs - AHEAD
    return max(due, scene.ledger.submitted + 1) if idle else due


def _strike(scene: Scene, kills: int, seconds: float) -> None:
    """Kill, and make trouble between kills, until there were enough of both."""
    lane, rng = scene.service.lane, scene.rng
    weighted = faults.KILLS[lane]
    coming = _shuffled(list(troubles.TROUBLES[lane]), rng)
    troubled = 0
    while scene.kills < kills:
        if scene.seconds() > seconds:
            raise TimeoutError(f"{scene.kills} of {kills} kills in {seconds:.0f} s.")
        if scene.kills // TROUBLE_EVERY > troubled:
            troubled += 1
            fault = next(coming)
        else:
            fault = rng.choices(list(weighted), list(weighted.values()))[0]
        with suppress(SQLAlchemyError):  # a database that is away while a fault looks for its moment
            fault(scene)
        scene.pause(rng.uniform(0, MAX_GAP_SECONDS))


def _shuffled(things: list[troubles.Trouble], rng: random.Random) -> Iterator[troubles.Trouble]:
    """All of them in a random order, again and again."""
    while True:
        yield from rng.sample(things, len(things))


def _finish(scene: Scene, seconds: float) -> None:
    if not scene.until(lambda: scene.ledger.done, seconds):
        stuck = {order.number: order.state for order in scene.ledger.orders if not order.ended}
        raise TimeoutError(f"Not all jobs have ended after {seconds:.0f} s: {stuck}")


def _digests(running: Service, calm: Ledger) -> dict[str, str]:
    found = {}
    for order in calm.orders:
        assert order.state is not None
        if order.state.status is not Status.SUCCEEDED or order.state.checkpoint_id is None:
            raise SystemExit(f"The undisturbed {order.spec} ended {order.state}.")
        found[order.spec] = weights.digest(checkpoint_folder(running, order.state.checkpoint_id))
    return found


def _settled(running: Service, drawn: list[Order], undisturbed: dict[str, str]) -> bool:
    """The sweeps are those of the service, called now: their duties are due once a minute and once an hour."""
    try:
        time.sleep(1)
        sweeps.sweep_checkpoints(running.database, running.settings())
        sweeps.sweep_files(running.database, running.settings())
        return at_rest(running, drawn, "chaos", undisturbed)
    except SQLAlchemyError:
        return False
