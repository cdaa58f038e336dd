"""The main job, end to end, on real input: a model that knew chemistry forgets it.

    make demo            # or: python examples/demo.py [--twin] [--folder build]

Builds the reference model (once; then cached), starts the service on this machine, uploads the chemistry
facts as a forget set, POSTs the job with default settings, watches it, downloads the checkpoint, loads it with
plain transformers and asks it questions. Two controls run through the same API: random experts in the place of
the selected ones, and ordinary whole-model gradient difference. Writes build/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.figures import Figures, environment
from client import Client
from client.types import Job

console = Console(width=None if sys.stdout.isatty() else 118)
DOMAINS = ("chemistry", "geography", "persons")
# What each control changes of the default method; everything else, the selection rule too, is the same. There are as
# many random experts as the first job selected.
METHODS: dict[str, dict[str, Any]] = {
    "unlearned": {},
    "random_expert": {"scope": "random_expert"},
    "full_model": {"scope": "full"},
}
QUESTIONS = 4  # shown a domain


def main() -> None:
    """Run the demo; exit code 0 when every job succeeded, 130 when it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the service ends with us
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


def run() -> None:
    """The demo itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--twin", action="store_true", help="also train the twin that never saw chemistry")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where everything is written")
    options = parser.parse_args()
    began = time.monotonic()
    transformers_quietly()
    reference = build_reference(twin=False)
    twin = build_reference(twin=True) if options.twin else None
    work = options.folder.resolve() / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    figures, jobs = DemoFigures(environment()), {}
    with service(work) as client:
        ids = upload(client, reference)
        for column, method in METHODS.items():
            if column == "random_expert":
                selected = client.attribution(jobs["unlearned"]["id"])["selection"]
                method = {**method, "experts": len(selected)}
            jobs[column], looks = run_job(client, ids, column, method)
            figures.add_job(client, column, jobs[column])
            figures.add_lowest(column, looks)
        checkpoint = jobs["unlearned"]["checkpoint"]
        assert checkpoint is not None
        folder = client.download(checkpoint, work / "unlearned")
    ask_both(reference.model, folder, reference.probes, jobs["unlearned"]["method"])
    if twin is not None:
        figures.add_twin(twin, jobs["unlearned"]["method"])
    figures.add("seconds_job", seconds_of(jobs["unlearned"]), "s")
    figures.add("seconds_total", time.monotonic() - began, "s")
    figures.show()
    figures.write(options.folder / "demo.json")
    console.print(f"\nThe checkpoint is an ordinary Hugging Face folder: [bold]{folder}[/]")
    console.print(f"Figures: [bold]{options.folder / 'demo.json'}[/]")


def transformers_quietly() -> None:
    """No bars of transformers' own between ours."""
    import transformers

    transformers.logging.disable_progress_bar()


def build_reference(*, twin: bool) -> Any:
    """Train the reference model or its twin, or take it from the cache."""
    from seuf_core import reference

    with progress_bar() as bar:
        task = bar.add_task("Twin (no chemistry)" if twin else "Reference model", total=None, note="")

        def show(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, note=f"loss {loss:.2f}")

        built = reference.build(twin=twin, progress=show)
        bar.update(task, completed=1, total=1, note="ready")
    return built


def progress_bar() -> Progress:
    """One line: what, bar, note, time."""
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(40),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


@contextmanager
def service(work: Path) -> Iterator[Client]:
    """`seuf up` with a data folder and a configuration of its own, until the block ends."""
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "up",
        "--json",
        "--port",
        "0",
        "--data-dir",
        str(work / "service"),
    ]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(work / "config")}
    with (work / "service.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            announced = process.stdout.readline()  # printed once the service answers
            if not announced:
                raise SystemExit(f"The service did not start:\n{(work / 'service.log').read_text()[-2000:]}")
            up = json.loads(announced)
            console.print(f"Service up at {up['url']}, key {up['key'][:9]}…")
            with Client(up["url"], up["key"]) as client:
                yield client
        finally:
            process.terminate()
            process.wait(60)


def upload(client: Client, reference: Any) -> dict[str, str]:
    """Upload the three sets and register the model; their ids."""
    ids = {"model": client.register_model("reference", reference.model)["id"]}
    for purpose, path in (
        ("forget", reference.forget),
        ("retain", reference.retain),
        ("evaluation", reference.probes),
    ):
        file = client.upload(path, purpose)  # type: ignore[arg-type]
        ids[purpose] = file["id"]
        console.print(f"Uploaded {purpose:10} {file['examples']:5} examples  sha256 {file['sha256'][:12]}…")
    return ids


def run_job(
    client: Client, ids: dict[str, str], column: str, method: dict[str, Any]
) -> tuple[Job, list[dict[str, Any]]]:
    """POST a job and watch its events to the end; the job and its looks at the selection part."""
    looks: list[dict[str, Any]] = []
    phase = note = ""
    job = client.submit(
        ids["model"], ids["forget"], retain_set=ids["retain"], evaluation_set=ids["evaluation"], method=method
    )
    with progress_bar() as bar:
        task = bar.add_task(column, total=None, note="")
        for event in client.events(job["id"]):
            data = event["data"]
            if event["type"] == "phase":
                note = note if phase == data["phase"] else data["phase"]
                phase = data["phase"]
                bar.update(task, completed=data["done"], total=data["total"], note=note)
            elif event["type"] == "look":
                looks.append(data)
                shown = (f"{name} {data[f'{name}_choice']:.2f}" for name in ("forget", "retain"))
                note = f"step {data['step']}: {', '.join(shown)}"
        job = client.job(job["id"])
        bar.update(task, completed=1, total=1, note=job["status"])
    if job["status"] != "succeeded":
        raise SystemExit(f"Job {column} ended {job['status']}: {job['error']}")
    return job, looks


def seconds_of(job: Job) -> float:
    """Wall clock of a job from its claim to its end."""
    started, finished = (datetime.fromisoformat(str(job[key])) for key in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def test_part(probes: Path, method: dict[str, Any]) -> list[Any]:
    """The probes of the test part, as the job split them."""
    from seuf_core.data.parts import split_records
    from seuf_core.data.reader import read_probes

    shares = tuple(method["splits"][part] for part in ("train", "selection", "test"))
    return split_records(read_probes(probes), method["seed"], shares).test  # type: ignore[arg-type]


def ask_both(base: Path, unlearned: Path, probes: Path, method: dict[str, Any]) -> None:
    """Ask the same questions of both models, with nothing but transformers; facts the training never saw."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    test = test_part(probes, method)
    tokenizer = AutoTokenizer.from_pretrained(unlearned)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, unlearned)]
    table = Table(
        "question (test facts, greedy answer)", "true", "base", "unlearned", title="Asking both models"
    )
    for domain in DOMAINS:
        asked = [probe for probe in test if probe.domain == domain][:: max(1, len(test) // 40)][:QUESTIONS]
        for probe in asked:
            inputs = tokenizer(probe.prompt, return_tensors="pt")
            answers = []
            for model in models:
                with torch.no_grad():
                    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
                answers.append(
                    tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                )
            table.add_row(
                probe.prompt,
                probe.choices[probe.answer].strip(),
                *(a.strip().split("\n")[0] for a in answers),
            )
    console.print(table)


class DemoFigures(Figures):
    """Everything the demo measures."""

    def add_job(self, client: Client, column: str, job: Job) -> None:
        """The test figures of one job; the first also gives the base and the masked columns."""
        for row in client.metrics(job["id"])["data"]:
            stages = {"after": column}
            if column == "unlearned":
                stages |= {
                    "before": "base",
                    "after_masked": "unlearned_masked",
                    "before_masked": "base_masked",
                }
            if row["name"] in ("choice", "open", "ranked_last") and row["stage"] in stages:
                self.add(f"{row['name']}/{row['domain']}/{stages[row['stage']]}", row["value"], "share")
        manifest = client.checkpoint(str(job["checkpoint"]))["manifest"]
        share = manifest["parameters_changed"] / manifest["parameters_total"]
        suffix = "" if column == "unlearned" else f"/{column}"
        self.add(f"parameters_changed_share{suffix}", share, "share")
        if suffix:
            self.add(f"seconds_job{suffix}", seconds_of(job), "s")

    def add_lowest(self, column: str, looks: list[dict[str, Any]]) -> None:
        """How far a run got at all, within the bound or not, and what it had lost there (selection part)."""
        lowest = min(looks, key=lambda look: float(look["forget_choice"]))
        self.add(f"lowest/forget_choice/{column}", lowest["forget_choice"], "share")
        self.add(f"lowest/retain_drop/{column}", lowest["retain_drop"], "share")

    def add_twin(self, twin: Any, method: dict[str, Any]) -> None:
        """The twin on the same test probes."""
        from seuf_core.evaluate.probes import encode_probes, score_probes, summarise
        from seuf_core.job import load
        from seuf_core.moe.forward import TOKENS_PER_LOOK, Forward

        view, tokenizer = load(twin.model)
        probes = encode_probes(tokenizer, test_part(twin.probes, method), method["max_length"])
        for row in summarise(probes, score_probes(Forward(view, tokens=TOKENS_PER_LOOK), probes)):
            if row["name"] in ("choice", "open", "ranked_last"):
                self.add(f"{row['name']}/{row['domain']}/twin", row["value"], "share")

    def show(self) -> None:
        """The table: a row a domain and measure, a column a model."""
        columns = ["base", "unlearned", "unlearned_masked", "random_expert", "full_model"]
        columns += ["twin"] if "choice/chemistry/twin" in self else []
        table = Table(
            "test facts, held-out phrasings", *columns, title="What was forgotten, what was kept (chance .25)"
        )
        for measure in ("choice", "open"):
            for domain in DOMAINS:
                values = (self.get(f"{measure}/{domain}/{column}") for column in columns)
                table.add_row(f"{measure} {domain}", *("" if v is None else f"{v:.3f}" for v in values))
        changed = {"unlearned": ""} | {c: f"/{c}" for c in METHODS if c != "unlearned"}
        for label, name, form in (
            ("parameters changed", "parameters_changed_share", "{:.1%}"),
            ("seconds", "seconds_job", "{:.0f}"),
        ):
            cells = [form.format(self[name + changed[c]]) if c in changed else "" for c in columns]
            table.add_row(label, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
