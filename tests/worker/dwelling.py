"""The real method, lingering once in a phase, so that a test can stop the process exactly there.

SEUF_ENGINE_ENTRY points at one of these functions: each names the phase in which the first attempt of a job lingers.
Every later attempt lingers when it evaluates: it may have inherited a training that is finished.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from seuf_core.observer import Observer

LINGER_SECONDS = 5.0
"""A process that is stopped while it lingers has slept enough when it goes on, and goes on at once."""
HALF_WAY = 0.5


class Lingers:
    """Passes everything on, and sleeps once in its phase: at its beginning, or half way through the training."""

    def __init__(self, observer: Observer, phase: str, mark: Path) -> None:
        self.observer, self.where, self.mark = observer, phase, mark

    def phase(self, name: str, done: int, total: int) -> None:
        self.observer.phase(name, done, total)
        due = done / total >= HALF_WAY if name == "unlearning" else True
        if name == self.where and due and not self.mark.exists():
            self.linger()

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        self.observer.event(type, data)

    def cancelled(self) -> bool:
        return self.observer.cancelled()

    def linger(self) -> None:
        self.mark.touch()
        time.sleep(LINGER_SECONDS)


def _lingering(
    phase: str, model: Path, forget: Path, out: Path, *, work: Path, observer: Observer, **rest: Any
) -> Any:
    from seuf_core import unlearn  # loads torch

    job = work.parents[1]
    first = not (job / "lingered").exists()
    where, mark = (phase, job / "lingered") if first else ("evaluating", job / "lingered-again")
    lingers = Lingers(observer, where, mark)
    result = unlearn(model, forget, out, work=work, observer=lingers, **rest)
    if where == "written" and not mark.exists():
        lingers.linger()
    return result


training = partial(_lingering, "unlearning")
evaluating = partial(_lingering, "evaluating")
publishing = partial(_lingering, "publishing")
written = partial(_lingering, "written")
