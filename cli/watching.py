"""Following a job of a service to its end, and saying how it ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cli import output

if TYPE_CHECKING:
    from cli.live import Live
    from client import Client
    from client.types import Event, Job

# An event says that something moved; the job says where it stands, time left included.
LOOK_SECONDS = 1.0


def follow(client: Client, job_id: str, json: bool) -> Job:
    """Show the events of a job until its last; with `json`, print them, one a line. Returns the ended job."""
    if json:
        for event in client.events(job_id):
            output.print_json(event)
        return client.job(job_id)
    from cli.live import Live

    looked = 0.0
    with Live() as live:
        for event in client.events(job_id):
            _note(live, event)
            if event["type"] in ("phase", "step") and time.monotonic() - looked >= LOOK_SECONDS:
                _show(live, client.job(job_id))
                looked = time.monotonic()
    return client.job(job_id)


def _show(live: Live, job: Job) -> None:
    progress = job["progress"]
    live.show(
        progress["phase"] or job["status"],
        progress["done"],
        progress["total"],
        step=progress["step"],
        loss=progress["loss"],
        seconds_left=progress["seconds_left"],
    )


def _note(live: Live, event: Event) -> None:
    """The few events a person wants to keep on the screen."""
    data = event["data"]
    match event["type"]:
        case "status":
            live.show(str(data["status"]))
        case "selection":
            experts = ", ".join(f"layer {e['layer']} expert {e['expert']}" for e in data["experts"])
            live.note(f"selected: {experts}")
        case "warning":
            live.note(f"warning: {data.get('message', '')}")


def outcome(client: Client, job: Job) -> None:
    """How it ended: the before/after table and the next command, or what went wrong."""
    error = job["error"]
    if error is not None:
        output.say(f"{job['id']} {job['status']}: {error['message']} {error['fix'] or ''}".rstrip())
        return
    output.say(f"{job['id']} {job['status']}.")
    if job["status"] == "succeeded":
        output.print_metrics(client.metrics(job["id"])["data"])
        output.say(f"Download the checkpoint with: seuf download {job['id']} --out unlearned")
