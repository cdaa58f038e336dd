"""Following a job of a service to its end, and saying how it ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cli import output

if TYPE_CHECKING:
    from cli.live import Live
    from client import Client
    from client.types import Event, Job, Progress

LOOK_SECONDS = 1.0  # between two looks at the job itself


def follow(client: Client, job_id: str, json: bool) -> Job:
    """Show the events of a job until its last; with `json`, print them, one a line. Returns the ended job."""
    if json:
        for event in client.events(job_id):
            output.print_json(event)
        return client.job(job_id)
    from cli.live import Live

    with Live() as live:
        shown = _Shown(client, live, job_id)
        for event in client.events(job_id):
            shown.take(event)
    return client.job(job_id)


class _Shown:
    """Turns events into what a person sees."""

    def __init__(self, client: Client, live: Live, job_id: str) -> None:
        self._client = client
        self._live = live
        self._job_id = job_id
        self._looked = 0.0
        self._place: tuple[str, int, int] = ("queued", 0, 0)
        self._training: Progress | None = None

    def take(self, event: Event) -> None:
        """One event."""
        data = event["data"]
        match event["type"]:
            case "status":
                self._live.show(str(data["status"]))
            case "phase":
                if data["phase"] != self._place[0]:
                    self._training = None
                self._place = (data["phase"], data["done"], data["total"])
                self._show()
            case "step":
                self._look()
                self._show()
            case "selection":
                self._live.selected(data["experts"])
            case "warning":
                self._live.note(f"warning: {data.get('message', '')}")

    def _look(self) -> None:
        """The job knows the time left, which events do not carry."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._training = self._client.job(self._job_id)["progress"]
            self._looked = time.monotonic()

    def _show(self) -> None:
        training = self._training
        if training is None:
            self._live.show(*self._place)
            return
        self._live.show(
            *self._place,
            step=training["step"],
            loss=training["loss"],
            seconds_left=training["seconds_left"],
        )


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
