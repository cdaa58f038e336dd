"""Every score, scope, router mode, objective and retain term runs from the library, the command and the service;
what cannot be had together is refused by all of them in the same words.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app, main
from client import ApiError, Client
from client.types import Job
from seuf_core import Method, attribute, unlearn
from seuf_core.attribution.selection import coverage
from tests import tiny
from tests.combinations import CHOICES, FIXED, IMPOSSIBLE, changed_parts, packed, trained_parts
from tests.shell import Shell, stop

PACKED = {" ".join(f"{k}={v}" for k, v in row.items()): row for row in packed()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, forget.jsonl and retain.jsonl."""
    folder = tmp_path_factory.mktemp("every-choice")
    tiny.write_model(folder / "model", "qwen2_moe")
    for name, kind in (("forget", "element"), ("retain", "country")):
        rows = [{"prompt": f"{kind} {i} is", "completion": f" x{i * 7}y"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Client]:
    """`seuf up` with its worker: one for all."""
    shell = Shell(home)
    process = shell.start("--json")
    try:
        assert process.stdout is not None
        up = json.loads(process.stdout.readline())
        with Client(up["url"], up["key"]) as client:
            client.register_model("tiny", home / "model")
            yield client
        assert "Traceback" not in stop(process)
    finally:
        shell.clean_up()


@pytest.fixture(scope="module")
def files(service: Client, home: Path) -> dict[str, str]:
    """The uploaded sets."""
    return {
        purpose: service.upload(home / f"{purpose}.jsonl", purpose)["id"] for purpose in ("forget", "retain")
    }  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def jobs(service: Client, files: dict[str, str]) -> dict[str, Job]:
    """Every packed method as a job, all in the queue at once: they run while the other tests do."""
    return {
        name: service.submit("tiny", files["forget"], retain_set=files["retain"], method={**FIXED, **asked})
        for name, asked in PACKED.items()
    }


@pytest.fixture
def handlers() -> Iterator[None]:
    """`seuf run` in this process takes the signals; they are given back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def options_of(method: dict[str, Any]) -> list[str]:
    """The method as a user types it."""
    return [word for name, value in method.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_the_packed_methods_hold_every_choice() -> None:
    rows = list(PACKED.values())
    assert all(any(choice.items() <= row.items() for row in rows) for choice in CHOICES.values())
    assert len(rows) < len(CHOICES) / 2


@pytest.mark.parametrize("name", PACKED)
def test_the_service_takes_it(jobs: dict[str, Job], name: str) -> None:
    wanted = Method.model_validate({**FIXED, **PACKED[name]})
    assert jobs[name]["method"] == wanted.model_dump(mode="json")


@pytest.mark.parametrize("name", CHOICES)
def test_the_library_runs_it(home: Path, tmp_path: Path, name: str) -> None:
    asked = CHOICES[name]
    method = Method.model_validate({**FIXED, **asked})
    result = unlearn(
        home / "model",
        home / "forget.jsonl",
        tmp_path / "out",
        retain=home / "retain.jsonl",
        method=method,
        work=tmp_path / "work",
    )
    assert result.manifest is not None
    assert changed_parts(result.manifest.model_dump(mode="json")) == trained_parts(asked)
    assert result.chosen["step"] == FIXED["steps"]
    assert bool(result.selection) == method.selects_experts
    assert (result.attribution or {}).get("score") == (method.attribution if method.selects_experts else None)


@pytest.mark.parametrize("name", PACKED)
def test_the_command_runs_it(home: Path, tmp_path: Path, handlers: None, name: str) -> None:
    asked = PACKED[name]
    sets = ("--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl"))
    command = ["run", "--model", str(home / "model"), *sets, "--out", str(tmp_path / "out"), "--json"]
    scored = Method.model_validate({**FIXED, **asked}).selects_experts
    command += ["--heatmap", str(tmp_path / "map.svg")] if scored else []
    done = CliRunner().invoke(app, [*command, *options_of({**FIXED, **asked})], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {row["stage"] for row in result["metrics"]} >= {"before", "after"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert changed_parts(manifest) == trained_parts(asked)
    if scored:
        drawn = (tmp_path / "map.svg").read_text()
        assert all(f"layer {one['layer']}, expert {one['expert']}" in drawn for one in result["selection"])


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_the_same_words(
    service: Client,
    files: dict[str, str],
    home: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, fields, _ = IMPOSSIBLE[name]
    with pytest.raises(ApiError) as refused:
        service.submit("tiny", files["forget"], retain_set=files["retain"], method=asked)
    assert refused.value.status == 422
    errors = refused.value.problem["errors"]
    assert [error["pointer"] for error in errors] == [f"/method/{field}" for field in fields]
    words = f"{errors[0]['detail']} {errors[0]['fix']}"
    sets = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    for command in (["run", "--out", "never"], ["submit"], ["attribute"]):
        model = ["--model", str(home / "model")]
        monkeypatch.setattr("sys.argv", ["seuf", *command, *model, *sets, *options_of(asked)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"error: {words}\n"


def test_a_dense_model_is_refused_in_the_same_words_where_experts_are_chosen(
    service: Client,
    files: dict[str, str],
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    handlers: None,
) -> None:
    dense = tiny.write_model(tmp_path / "dense", "llama")
    service.register_model("dense", dense)
    with pytest.raises(ApiError) as refused:
        service.submit("dense", files["forget"], retain_set=files["retain"])
    (error,) = refused.value.problem["errors"]
    assert (refused.value.status, error["pointer"], error["code"]) == (422, "/method/scope", "dense_model")
    sets = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    command = ["seuf", "run", "--model", str(dense), *sets, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error['detail']} {error['fix']}"
    done = CliRunner().invoke(
        app, [*command[1:], *options_of({**FIXED, "scope": "lora"})], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert changed_parts(manifest) == {"rest"}


def test_the_command_attributes_without_training(home: Path, tmp_path: Path, handlers: None) -> None:
    model, forget = ("--model", str(home / "model")), ("--forget", str(home / "forget.jsonl"))
    written = ["--heatmap", str(tmp_path / "map.svg"), "--matrix", str(tmp_path / "scores.json")]
    command = ["attribute", *model, *forget, "--attribution", "affinity", "--experts", "2", *written]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = attribute(home / "model", home / "forget.jsonl", method=Method(attribution="affinity", experts=2))
    found = made.as_dict()
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(found))
    rows = [line.split() for line in done.stdout.splitlines() if line.rstrip().endswith("yes")]
    assert rows == [
        [str(one.layer), str(one.expert), f"{one.score:.4f}", f"{seen:.3f}", "yes"]
        for place, one in enumerate(made.selection, start=1)
        for seen in [coverage(made.forget, made.selection[:place])]
    ]
    assert f"{found['coverage']:.3f}  of the forget answer tokens" in done.stdout
    assert "warning" not in done.stderr
    best = found["selection"][0]
    assert f"layer {best['layer']}, expert {best['expert']}" in (tmp_path / "map.svg").read_text()
    assert (home / "model" / "config.json").exists()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["map.svg", "scores.json"]


def test_attributing_asks_for_a_retain_set_only_where_the_score_needs_one(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["seuf", "attribute", "--model", str(home / "model"), "--forget", str(home / "forget.jsonl")]
    for options, words in (
        (
            (),
            "no retain set, which attribution contrast cannot do without. Give one, or use attribution affinity.",
        ),
        (("--scope", "full"), "scope full selects no expert. Use scope seuf."),
    ):
        monkeypatch.setattr("sys.argv", [*base, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", PACKED)
def test_the_service_runs_it(service: Client, jobs: dict[str, Job], name: str) -> None:
    list(service.events(jobs[name]["id"]))
    job = service.job(jobs[name]["id"])
    assert job["status"] == "succeeded", job["error"]
    assert changed_parts(service.checkpoint(str(job["checkpoint"]))["manifest"]) == trained_parts(
        PACKED[name]
    )
    if Method.model_validate(job["method"]).selects_experts:
        attribution = service.attribution(job["id"])
        assert attribution["score"] == job["method"]["attribution"]
        assert service.heatmap(job["id"]).count("<rect ") > len(attribution["layers"]) * 8
    else:
        with pytest.raises(ApiError, match="has no attribution"):
            service.attribution(job["id"])
