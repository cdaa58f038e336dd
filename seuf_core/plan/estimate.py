"""The plan of a job that has not begun, from the same inputs. Torch-free: milliseconds, and no weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from seuf_core.inputs import read_inputs
from seuf_core.method import Method
from seuf_core.plan.facts import Calibration, Machine, model_shape
from seuf_core.plan.machine import machine
from seuf_core.plan.planner import Plan, make_plan
from seuf_core.plan.tokens import count_tokens


def estimate(
    model: Path,
    forget: Path,
    *,
    retain: Path | None = None,
    evaluation: Path | None = None,
    method: Method | None = None,
    memory: int | str | None = None,
    on: Machine | None = None,
    calibration: Calibration | None = None,
    missing: str = "Nothing was calibrated.",
) -> Plan:
    """Say what `unlearn` with the same arguments would read, hold, write and, with a calibration, take.

    Args:
        memory: what the job may use, such as "6GB"; None = SEUF_MEMORY, else what is free here.
        on: the machine of the job, where it is another one.
        calibration: see seuf_core.plan.calibrate; missing: why there is none.

    Raises:
        DataError, ModelError, MethodError: as `unlearn` would, before it begins.
    """
    method, heard = method or Method(), _Heard()
    inputs = read_inputs(model, forget, retain, evaluation, method, heard)
    plan = make_plan(
        model_shape(model),
        count_tokens(model, inputs, method),
        method,
        on or machine(memory),
        calibration=calibration,
        missing=missing,
    )
    return replace(plan, notes=(*heard.warnings, *plan.notes))


class _Heard:
    """Keeps the warnings of reading the inputs."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def phase(self, name: str, done: int, total: int) -> None:
        """Ignore."""

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002  (the protocol's name)
        """Keep a warning."""
        if type == "warning":
            self.warnings.append(str(data["message"]))

    def cancelled(self) -> bool:
        """Never."""
        return False
