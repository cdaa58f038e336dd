"""How a run tells the outside where it is, and hears that it should stop."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Called from the thread that runs the job; must return quickly."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a phase: validating, attributing, unlearning, evaluating, publishing."""
        ...

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002 - the field's name in the API
        """Something worth keeping: `attribution`, `selection`, `step`, `look`, `rung`, `warning`.

        `data` is JSON and never holds text of a data set.
        """
        ...

    def cancelled(self) -> bool:
        """Asked after every step and while publishing; true ends the run with `Cancelled`.

        The training checkpoint is written before that.
        """
        ...


class Silent:
    """An observer that hears nothing and never cancels."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Ignore."""

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        """Ignore."""

    def cancelled(self) -> bool:
        """Never."""
        return False
