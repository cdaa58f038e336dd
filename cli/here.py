"""What a run on this machine shows of itself, how Ctrl-C ends it, and the picture it leaves."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli import output
from seuf_core.errors import Cancelled

if TYPE_CHECKING:
    from cli.live import Live


def quietly() -> None:
    """No bars of transformers' own between ours."""
    import transformers

    transformers.logging.disable_progress_bar()


def draw(path: Path, attribution: Mapping[str, Any]) -> None:
    """Write the heatmap of `Attributed.as_dict` and say where."""
    from seuf_core.attribution.heatmap import attribution_svg

    path.write_text(attribution_svg(attribution), encoding="utf-8")
    output.say(f"The scores are drawn in {path}.")


class Shown:
    """Shows a run as it goes; Ctrl-C ends it after the step, with a training checkpoint."""

    def __init__(self, live: Live, unheard: Collection[str] = ()) -> None:
        self._live = live
        self._unheard = unheard  # codes of warnings that do not matter to this command
        self._stop = False
        self._step: dict[str, Any] = {}
        self._place: tuple[str, int, int] = ("loading", 0, 0)
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._interrupted)

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a phase; one in which nothing is worth saving ends here when Ctrl-C was pressed."""
        if self._stop and name not in ("unlearning", "publishing"):
            raise Cancelled
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
            self._live.selected(data["experts"])
        elif type == "warning" and data.get("code") not in self._unheard:
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
