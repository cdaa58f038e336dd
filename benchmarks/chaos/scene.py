"""Where faults are done: a service at work, its jobs, and one loop that keeps both going while a fault waits."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.chaos.orders import Ledger, Order
from benchmarks.chaos.service import Service
from store.transitions import HELD

TICK_SECONDS = 0.01


@dataclass(frozen=True)
class Done:
    """One fault that was done. `kill`: what it killed (engine, worker, api, dispatcher), if it killed something of
    ours. `phase`: that of the job it hit, or what the victim was doing.
    """

    name: str
    phase: str
    at_seconds: float
    kill: str | None = None
    job: str | None = None


@dataclass
class Scene:
    """One run on one service."""

    service: Service
    ledger: Ledger
    rng: random.Random
    began: float = field(default_factory=time.monotonic)
    done: list[Done] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Kills so far."""
        return sum(one.kill is not None for one in self.done)

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began

    def tick(self) -> None:
        """Start what has fallen, submit and cancel what is due, and wait for a moment."""
        self.service.keeper.look()
        self.ledger.look()
        time.sleep(TICK_SECONDS)

    def until(self, true: Callable[[], bool], seconds: float) -> bool:
        """Go on until `true()`, at most so long; whether it came true."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                return False
            self.tick()
        return True

    def pause(self, seconds: float) -> None:
        """Go on for so long."""
        self.until(lambda: False, seconds)

    def nap(self, seconds: float) -> None:
        """Wait without a look at anything, for a moment that must be hit to the millisecond."""
        time.sleep(seconds)
        self.ledger.read()

    def held(self, phase: str | None = None) -> list[Order]:
        """Orders whose job a worker holds (in this phase)."""
        return [
            order
            for order in self.ledger.open
            if order.state is not None
            and order.state.status in HELD
            and order.state.supervisor is not None
            and phase in (None, order.phase)
        ]

    def note(self, name: str, phase: str, kill: str | None = None, order: Order | None = None) -> None:
        """Keep and print what was done."""
        job = order.ids[-1] if order is not None and order.ids else None
        self.done.append(Done(name, phase, self.seconds(), kill, job))
        waiting = Counter(one.phase or "ended" for one in self.ledger.orders if one.ids)
        counts = " ".join(f"{key}:{count}" for key, count in sorted(waiting.items()))
        say(f"{self.seconds():6.1f} s  kill {self.kills:3}  {name:28} {phase:14} {job or '':25} [{counts}]")


def say(line: str) -> None:
    """One line for whoever watches."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
