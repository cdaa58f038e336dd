"""`seuf`: the command and its subcommands. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli import attribute, audit, checkpoints, files, jobs, keys, models, plan, reference, run, tenants, up
from cli.errors import explain
from cli.method import MethodCommand

app = typer.Typer(
    name="seuf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a Mixture-of-Experts language model forget: as a service (seuf up) or directly (seuf run).",
    epilog="Start with:  seuf up  and, in another terminal,  seuf submit --help",
)


def _print_version(asked: bool) -> None:
    if asked:
        from seuf_core import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _example(text: str) -> str:
    return f"Example:  {text}"


app.command("up", epilog=_example("seuf up --data-dir ./seuf-data"))(up.up)
app.command(
    "submit",
    cls=MethodCommand,
    epilog=_example(
        "seuf submit --model ./model --forget forget.jsonl --retain retain.jsonl --steps 60 --watch"
    ),
)(jobs.submit)
app.command("watch", epilog=_example("seuf watch job_a2b3c4d5e6f7g2h3i4j5"))(jobs.watch)
app.command("get", epilog=_example("seuf get job_a2b3c4d5e6f7g2h3i4j5 --json"))(jobs.get)
app.command("list", epilog=_example("seuf list --status running"))(jobs.list_jobs)
app.command("cancel", epilog=_example("seuf cancel job_a2b3c4d5e6f7g2h3i4j5"))(jobs.cancel)
app.command("retry", epilog=_example("seuf retry job_a2b3c4d5e6f7g2h3i4j5 --watch"))(jobs.retry)
app.command("download", epilog=_example("seuf download job_a2b3c4d5e6f7g2h3i4j5 --out unlearned"))(
    jobs.download
)
app.command(
    "run",
    cls=MethodCommand,
    epilog=_example("seuf run --model ./model --forget forget.jsonl --retain retain.jsonl --out unlearned"),
)(run.run)
app.command(
    "plan",
    cls=MethodCommand,
    epilog=_example("seuf plan --model ./model --forget forget.jsonl --retain retain.jsonl --memory 6GB"),
)(plan.plan)
app.command(
    "attribute",
    cls=MethodCommand,
    epilog=_example(
        "seuf attribute --model ./model --forget forget.jsonl --retain retain.jsonl --heatmap experts.svg"
    ),
)(attribute.attribute)
app.command(
    "apply-delta", epilog=_example("seuf apply-delta ./model ./unlearned/delta.safetensors --out ./rebuilt")
)(checkpoints.apply_delta)
app.command("verify", epilog=_example("seuf verify ./unlearned"))(checkpoints.verify)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(audit.app, name="audit")
app.add_typer(reference.app, name="reference")


def main() -> None:
    """Entry point: exit code 0 done, 1 refused or failed (one line on stderr), 2 wrong usage."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; nothing is left to say, not even at exit.
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        typer.echo(f"error: {line}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
