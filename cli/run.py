"""`seuf run`: unlearning on this machine, without a service."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output

if TYPE_CHECKING:
    from cli.live import Live
    from seuf_core import UnlearnResult


def run(
    model: Annotated[Path, typer.Option(help="Folder of the base model; it is only read.")],
    forget: Annotated[Path, typer.Option(help="What to forget (JSON Lines).")],
    out: Annotated[Path, typer.Option(help="Folder to create for the unlearned model.")],
    retain: Annotated[Path | None, typer.Option(help="What to keep (JSON Lines).")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Probes for both (JSON Lines).")] = None,
    preset: options.Preset = None,
    objective: options.Objective = None,
    scope: options.Scope = None,
    attribution: options.Attribution = None,
    experts: options.Experts = None,
    router: options.Router = None,
    learning_rate: options.LearningRate = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    others: options.Set = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of training checkpoints: the same command with it goes on where it stopped."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Make a model forget, here and now: the same method as the service, without one."""
    named = {
        "preset": preset,
        "objective": objective,
        "scope": scope,
        "attribution": attribution,
        "experts": experts,
        "router": router,
        "learning_rate": learning_rate,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    from seuf_core.method import Method

    # Checked before torch is loaded, which takes seconds.
    method = Method.model_validate(options.method_of(named, others))
    options.existing(forget, "forget set")
    from cli.live import Live
    from seuf_core import unlearn

    with Live() as live, tempfile.TemporaryDirectory(prefix="seuf-run-") as scratch:
        live.show("loading")
        result = unlearn(
            model,
            forget,
            out,
            retain=retain,
            evaluation=evaluation,
            method=method,
            work=work or Path(scratch),
            observer=_Shown(live),
        )
    if json:
        output.print_json(_as_json(result))
    else:
        _tell(result)


class _Shown:
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


def _as_json(result: UnlearnResult) -> dict[str, Any]:
    return {
        "checkpoint": str(result.checkpoint),
        "selection": result.selection,
        "metrics": result.metrics,
        "chosen": result.chosen,
        "parameters_changed": result.parameters_changed,
        "parameters_total": result.parameters_total,
        "seconds": result.seconds,
    }


def _tell(result: UnlearnResult) -> None:
    output.print_metrics(result.metrics)
    share = 100 * result.parameters_changed / result.parameters_total
    output.say(
        f"{result.parameters_changed:,} of {result.parameters_total:,} parameters changed ({share:.2f} %)."
    )
    output.say(f"The unlearned model is in {result.checkpoint}; open it like any model folder.")
    typer.echo(str(result.checkpoint))
