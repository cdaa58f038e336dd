"""One line of progress that a person can follow: phase, bar, step, loss, time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cli import output

if TYPE_CHECKING:
    from rich.progress import Progress


class Live:
    """A progress bar on a terminal; a line per phase where there is none (a log, a pipe)."""

    def __init__(self) -> None:
        self._bar: Progress | None = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("waiting", total=None, facts="") if self._bar else None
        self._phase: str | None = None
        self._selected = ""

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(
        self,
        phase: str,
        done: int | None = None,
        total: int | None = None,
        *,
        step: int | None = None,
        loss: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Where it stands; `seconds_left` is an estimate."""
        facts = [f"step {step}" if step is not None else "", f"loss {loss:.4f}" if loss is not None else ""]
        facts.append(f"{output.duration(seconds_left)} left" if seconds_left is not None else "")
        if self._bar is not None and self._task is not None:
            # A total of 0 or none: the bar moves without saying how far.
            self._bar.update(
                self._task,
                description=phase,
                completed=done or 0,
                total=total or None,
                facts="  ".join(fact for fact in facts if fact),
            )
        elif phase != self._phase:
            output.say(phase)
        self._phase = phase

    def note(self, text: str) -> None:
        """A line that stays above the bar."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            output.say(text)

    def selected(self, chosen: Sequence[Mapping[str, Any]]) -> None:
        """Which experts are trained. The winner is named again at the end: news only if another was tried since."""
        experts = output.experts(chosen)
        if experts != self._selected:
            self.note(f"selected: {experts}")
        self._selected = experts


def _bar() -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=output.console(err=True),
        transient=True,
    )
