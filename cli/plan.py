"""`seuf plan`: what a job would read, hold, write and take, before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import method, options, output

if TYPE_CHECKING:
    from seuf_core.plan.facts import Calibration
    from seuf_core.plan.planner import Plan


def plan(
    context: typer.Context,
    model: options.Model,
    forget: options.Forget,
    retain: options.Retain = None,
    evaluation: options.Evaluation = None,
    memory: options.Memory = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Measure this machine on the model first, for a few seconds."
        ),
    ] = True,
    json: options.Json = False,
) -> None:
    """Say what a run would read, hold, write and take. Changes nothing."""
    _, wanted = method.given(context)
    options.existing(forget, "forget set")
    from seuf_core.plan.estimate import estimate
    from seuf_core.plan.machine import machine

    on = machine(memory)

    def made(calibration: Calibration | None = None) -> Plan:
        return estimate(
            model,
            forget,
            retain=retain,
            evaluation=evaluation,
            method=wanted,
            on=on,
            calibration=calibration,
            missing="Calibration was left out.",
        )

    # Made without one first: what is wrong with the inputs is then known before torch is loaded.
    found = made()
    if calibrate:
        from cli import here

        here.quietly()
        from seuf_core.plan.calibrate import accelerators, calibrate_model

        on = machine(memory, accelerators())
        found = made(calibrate_model(model, made().device))
    if json:
        output.print_json(found.as_dict())
    else:
        tell(found)


def tell(plan: Plan) -> None:
    """The phases as a table, then what was decided and why."""
    rows = [
        (
            phase.name,
            output.size(phase.bytes_read),
            output.size(phase.bytes_written),
            output.size(phase.peak_bytes),
            output.duration(phase.seconds),
        )
        for phase in plan.phases
    ]
    total = output.duration(plan.seconds)
    sizes = [output.size(size) for size in (plan.bytes_read, plan.bytes_written, plan.peak_bytes)]
    output.print_table(("phase", "read", "written", "peak memory", "time"), [*rows, ("job", *sizes, total)])
    typer.echo()
    every = (
        f", {output.duration(plan.seconds_all)} if all {plan.runs} rates are tried" if plan.runs > 1 else ""
    )
    output.print_fields(
        {
            "device": f"{plan.device}: {plan.device_why}",
            "weights": plan.residency_why,
            "memory": f"{output.size(plan.budget_bytes)}, {plan.budget_why}",
            "micro-batch": f"{plan.micro_batch_tokens:,} tokens",
            "trained": f"{plan.experts} experts from layer {plan.lowest_layer} on" if plan.experts else None,
            "time": f"{total}{every}" if total else plan.seconds_missing,
        }
    )
    for note in (*plan.notes, *(() if plan.fits else ("This does not fit in the memory that is there.",))):
        output.say(f"note: {note}")
