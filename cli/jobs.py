"""`seuf submit | watch | get | list | cancel | retry | download`: jobs of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import files, method, models, options, output
from cli.config import connect
from cli.errors import CommandError
from cli.watching import follow, outcome

if TYPE_CHECKING:
    from client import Client
    from client.types import Job, JobLimits

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]


def submit(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Name or id of a registered model, or a folder.")],
    forget: Annotated[str, typer.Option(help="What to forget: a file, or the id of an upload.")],
    retain: Annotated[str | None, typer.Option(help="What to keep: a file or an id.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Probes for both: a file or an id.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="End the job after so many seconds.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Main memory it may use, such as 6GB; it plans for that.")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="name=value, kept with the job.")] = None,
    watching: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Start a job. Files and model folders given as paths are uploaded and registered first."""
    # Checked here too, so that nothing is uploaded for a method that the service would refuse.
    fields, wanted = method.given(context)
    wanted.check_retain(given=retain is not None)
    labels = dict(options.pairs(metadata, "--metadata"))
    limits = _limits(max_seconds, max_memory)
    with connect(url, key) as client:
        job = client.submit(
            _model(client, model),
            files.given(client, forget, "forget"),
            retain_set=files.given(client, retain, "retain") if retain else None,
            evaluation_set=files.given(client, evaluation, "evaluation") if evaluation else None,
            method=fields,
            limits=limits,
            metadata=labels,
        )
        if watching:
            if not json:
                output.say(f"{job['id']} is queued.")
            _watch(client, job["id"], json)
        elif json:
            output.print_json(job)
        else:
            typer.echo(job["id"])
            output.say(f"Follow it with: seuf watch {job['id']}")


def _limits(max_seconds: float | None, max_memory: str | None) -> JobLimits | None:
    """What was given, None where nothing was: then an older service is not asked for what it does not know."""
    from client.types import JobLimits
    from seuf_core.plan.machine import parse_size

    limits = JobLimits()
    if max_seconds is not None:
        limits["max_seconds"] = max_seconds
    if max_memory is not None:
        limits["max_memory_bytes"] = parse_size(max_memory)
    return limits or None


def _model(client: Client, text: str) -> str:
    """The id or name behind what the user wrote; a folder is registered if the service does not know it."""
    return models.registered(client, Path(text)) if Path(text).is_dir() else text


def watch(job: JobId, url: options.Url = None, key: options.Key = None, json: options.Json = False) -> None:
    """Follow a job live until it ends; exit code 1 if it did not succeed. With --json: one event a line."""
    with connect(url, key) as client:
        _watch(client, job, json)


def _watch(client: Client, job_id: str, json: bool) -> None:
    job = follow(client, job_id, json)
    if not json:
        outcome(client, job)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def get(
    job: JobId,
    heatmap: options.Heatmap = None,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Show a job as it stands now, with its selected experts and its figures."""
    with connect(url, key) as client:
        found = client.job(job)
        if heatmap is not None:
            heatmap.write_text(client.heatmap(job), encoding="utf-8")
        if json:
            output.print_json(found)
            return
        output.print_fields(_fields(found) | {"experts": _experts(client, job)})
        if found["finished_at"] is not None:
            metrics = client.metrics(job)["data"]
            if metrics:
                typer.echo()
                output.print_metrics(metrics)


def _experts(client: Client, job_id: str) -> str | None:
    """The experts that the job trains, once they are known."""
    from client import ApiError

    try:
        return output.experts(client.attribution(job_id)["selection"]) or None
    except ApiError as error:
        if error.code != "attribution_not_there":
            raise
        return None


# What the method line of a job tells; all of it is in --json.
_TOLD = ("scope", "attribution", "experts", "router", "objective", "retain_loss", "strength", "seed")


def _fields(job: Job) -> dict[str, object]:
    progress, error = job["progress"], job["error"]
    where = f"{progress['phase']} {progress['done']}/{progress['total']}" if progress["phase"] else None
    return {
        "job": job["id"],
        "status": job["status"],
        "phase": where,
        "step": progress["step"],
        "loss": progress["loss"],
        "time left": output.duration(progress["seconds_left"]) if job["finished_at"] is None else None,
        "error": f"{error['message']} {error['fix'] or ''}" if error else None,
        "model": job["model"],
        "method": ", ".join(f"{name} {job['method'][name]}" for name in _TOLD),
        "forget set": job["forget_set"],
        "retain set": job["retain_set"],
        "evaluation set": job["evaluation_set"],
        "limits": ", ".join(f"{name} {value:.15g}" for name, value in job["limits"].items() if value) or None,
        "retry of": job["retry_of"],
        "metadata": " ".join(f"{name}={value}" for name, value in job["metadata"].items()) or None,
        "created": job["created_at"],
        "started": job["started_at"],
        "finished": job["finished_at"],
        "checkpoint": job["checkpoint"],
    }


def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model (id or name).")] = None,
    limit: options.Limit = 20,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """List jobs, newest first."""
    with connect(url, key) as client:
        page = client.jobs(status=status, model=model, limit=limit)
        names = {} if json else {m["id"]: m["name"] for m in client.models(limit=100)["data"]}
    if json:
        output.print_json(page)
        return
    rows = [
        (job["id"], job["status"], job["phase"], names.get(job["model"], job["model"]), job["created_at"])
        for job in page["data"]
    ]
    output.print_table(("job", "status", "phase", "model", "created"), rows)


def cancel(job: JobId, url: options.Url = None, key: options.Key = None, json: options.Json = False) -> None:
    """Cancel a job: a queued one at once, a running one as soon as its worker has stopped it."""
    with connect(url, key) as client:
        found = client.cancel(job)
    if json:
        output.print_json(found)
    else:
        typer.echo(found["status"])


def retry(
    job: JobId,
    watching: Annotated[bool, typer.Option("--watch", help="Follow the new job to its end.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Run a failed or cancelled job again, as a new one that goes on from its last training checkpoint."""
    with connect(url, key) as client:
        found = client.retry(job)
        if watching:
            if not json:
                output.say(f"{found['id']} is queued.")
            _watch(client, found["id"], json)
        elif json:
            output.print_json(found)
        else:
            typer.echo(found["id"])
            output.say(f"Follow it with: seuf watch {found['id']}")


def download(
    what: Annotated[str, typer.Argument(help="A job or a checkpoint.", metavar="JOB_OR_CHECKPOINT")],
    out: Annotated[Path | None, typer.Option(help="Folder to create; default: the checkpoint's id.")] = None,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Download a checkpoint. Goes on where it was cut off, checks every digest, appears only whole."""
    from cli.live import Live

    with connect(url, key) as client:
        checkpoint_id = _checkpoint(client, what)
        with Live() as live:
            folder = client.download(
                checkpoint_id,
                (out or Path(checkpoint_id)).absolute(),
                progress=lambda name, done, total: live.show(name, done, total),
            )
        shown: dict[str, Any] = {"checkpoint": checkpoint_id, "folder": str(folder)}
    if json:
        output.print_json(shown)
    else:
        typer.echo(str(folder))
        output.say("Every digest is right; open it like any model folder.")


def _checkpoint(client: Client, what: str) -> str:
    if what.startswith("ckpt_"):
        return what
    job = client.job(what)
    if job["checkpoint"] is None:
        fix = (
            f"Wait for it: seuf watch {what}" if job["finished_at"] is None else f"Look why: seuf get {what}"
        )
        raise CommandError(f"{what} is {job['status']} and has no checkpoint.", fix)
    return job["checkpoint"]
