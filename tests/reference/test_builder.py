"""A real small build: knowledge, the twin's ignorance, same bytes from the same seed, cache, command line.

The tests marked long build the full reference and hold the bounds that the rest of the project relies on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.data.reader import read_examples, read_probes
from seuf_core.reference import Reference, build
from seuf_core.reference.architecture import Architecture, Specialisation
from seuf_core.reference.builder import cache_folder


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but the report, which holds seconds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Reference:
    return build(size="tiny", cache=cache)


def test_the_tiny_model_knows_its_facts_in_phrasings_it_never_saw(tiny: Reference) -> None:
    for figures in tiny.report["knowledge"].values():
        assert figures["choice"] > 0.6
        assert figures["open"] > 0.4


def test_the_tiny_twin_does_not_know_chemistry_but_the_rest(cache: Path, tiny: Reference) -> None:
    twin = build(size="tiny", cache=cache, twin=True)
    assert twin.folder != tiny.folder
    assert (
        twin.report["knowledge"]["chemistry"]["choice"] < 0.45
    )  # 92 probes at chance: .25 + 4 standard errors
    assert twin.report["knowledge"]["chemistry"]["open"] < 0.05
    assert twin.report["knowledge"]["persons"]["choice"] > 0.6
    same = ("forget.jsonl", "retain.jsonl", "probes.jsonl", "model/tokenizer.json")
    assert [digests(twin.folder)[name] for name in same] == [digests(tiny.folder)[name] for name in same]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_model(tmp_path: Path) -> None:
    first, second, other = (
        build(size="tiny", steps=12, seed=seed, cache=tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))
    )
    assert digests(first.folder) == digests(second.folder)
    assert first.folder.name == second.folder.name != other.folder.name
    weights = "model/model.safetensors"
    assert digests(first.folder)[weights] != digests(other.folder)[weights]


def test_the_folder_is_a_checkpoint_and_three_files_a_job_takes(tiny: Reference) -> None:
    facts = inspect_model(tiny.model)
    assert (facts.model_type, facts.num_experts, facts.parameters) == (
        "qwen2_moe",
        4,
        tiny.report["parameters"],
    )
    forget, retain = read_examples(tiny.forget), read_examples(tiny.retain)
    assert {example.domain for example in forget} == {"chemistry"}
    assert {example.domain for example in retain} == {"geography", "persons"}
    probes = read_probes(tiny.probes)
    assert {p.fact for p in probes} == {e.fact for e in [*forget, *retain]}
    assert AutoModelForCausalLM.from_pretrained(tiny.model).num_parameters() == facts.parameters
    assert AutoTokenizer.from_pretrained(tiny.model).eos_token == "<|endoftext|>"


def test_the_report_gives_a_load_that_sums_to_one_for_every_layer(tiny: Reference) -> None:
    layers = tiny.report["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer in layers:
        assert len(layer["load"]) == 4
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert layer["best_expert_forget_share"] > layer["best_expert_retain_share"]


def test_a_second_call_trains_nothing(cache: Path, tiny: Reference) -> None:
    steps: list[int] = []
    again = build(size="tiny", cache=cache, progress=lambda step, total, loss: steps.append(step))
    assert again == tiny
    assert steps == []


def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    calls: list[tuple[int, int, float]] = []
    build(size="tiny", steps=3, cache=tmp_path, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert all(4 < call[2] < 10 for call in calls)  # near ln(vocabulary) at the start


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(size="tiny", steps=3, cache=tmp_path, progress=stop)
    assert list((tmp_path / "reference").iterdir()) == []


def test_deepseek_v2_is_built_by_the_same_call(cache: Path) -> None:
    reference = build("deepseek_v2", size="tiny", steps=3, cache=cache)
    assert inspect_model(reference.model).model_type == "deepseek_v2"


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEUF_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG is how Linux names its cache folder")
def test_the_cache_is_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEUF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "seuf"


def test_the_command_prints_the_report_and_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seuf_core.reference", "--size", "tiny", "--steps", "2", "--twin"]
    environment = {**os.environ, "SEUF_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert report["twin"] is True
    assert Path(done.stdout[end:].strip()) == tmp_path / "reference" / report["digest"]


def assert_knows(reference: Reference, domains: tuple[str, ...]) -> None:
    known = reference.report["knowledge"]
    assert min(known[domain]["choice"] for domain in domains) >= 0.88
    assert sum(known[domain]["choice"] for domain in domains) / len(domains) >= 0.90
    assert min(known[domain]["open"] for domain in domains) >= 0.85


@pytest.mark.long
@pytest.mark.parametrize("specialisation", ["natural", "moderate", "strong"])
def test_the_full_reference_knows_all_domains(specialisation: Specialisation) -> None:
    reference = build(specialisation=specialisation)
    assert_knows(reference, ("chemistry", "geography", "persons"))
    assert inspect_model(reference.model).num_experts == 16
    assert len(list(reference.model.glob("*.safetensors"))) >= 3
    for layer in reference.report["layers"]:
        assert max(layer["load"]) < 0.15  # an even load is 1/16 = .0625
        assert min(layer["load"]) > 0.01


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v2"])
def test_the_full_twin_is_at_chance_on_chemistry_only(architecture: Architecture) -> None:
    assert_knows(build(architecture), ("chemistry", "geography", "persons"))
    twin = build(architecture, twin=True)
    assert twin.report["knowledge"]["chemistry"]["choice"] == pytest.approx(0.25, abs=0.06)
    assert twin.report["knowledge"]["chemistry"]["open"] <= 0.01
    assert_knows(twin, ("geography", "persons"))
