"""What a run on this machine shows of itself, and how Ctrl-C ends it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.live import Live


class Shown:
    """Shows a run as it goes; Ctrl-C ends it after the step, with a training checkpoint."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._stop = False
        self._step: dict[str, Any] = {}
        self._place: tuple[str, int, int] = ("loading", 0, 0)
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._interrupted)

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a phase."""
        if name != self._place[0]:
            self._step = {}
        self._place = (name, done, total)
        self._show()

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002  (the protocol's name)
        """Something worth showing."""
        if type == "step":
            self._step = data
            self._show()
        elif type == "selection":
            experts = ", ".join(f"layer {e['layer']} expert {e['expert']}" for e in data["experts"])
            self._live.note(f"selected: {experts}")
        elif type == "warning":
            self._live.note(f"warning: {data.get('message', '')}")

    def cancelled(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._stop

    def _show(self) -> None:
        self._live.show(*self._place, step=self._step.get("step"), loss=self._step.get("loss"))

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self._live.note("stopping after this step; once more to stop at once")
