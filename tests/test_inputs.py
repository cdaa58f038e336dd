"""What measures a job: probes of both sides, split side by side with the examples, usable before the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seuf_core.data.batches import collate, encode_examples
from seuf_core.errors import DataError, ModelError
from seuf_core.inputs import SELECTION_PROBES, Inputs, read_inputs
from seuf_core.method import Attribution, Method
from seuf_core.observer import Silent
from seuf_core.pipeline import attribute, open_job
from tests import tiny
from tests.scored import routing_statistics


class Recorder(Silent):
    """Keeps the codes of the warnings it hears."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        if type == "warning":
            self.codes.append(data["code"])


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(side: str, count: int = 40) -> list[dict[str, Any]]:
    return [
        {"id": f"{side}{i}", "fact": f"{side}{i}", "prompt": "is", "completion": f" a{i}"}
        for i in range(count)
    ]


def probes(side: str, count: int = 40, answer: str = " x") -> list[dict[str, Any]]:
    return [
        {"id": f"{side}{i}", "prompt": f"{i} is", "choices": [answer, " y"], "answer": 0, "set": side}
        for i in range(count)
    ]


def read(
    folder: Path,
    evaluation: list[dict[str, Any]] | None,
    *,
    retain: bool = True,
    forget: int = 40,
    observer: Recorder | None = None,
) -> Inputs:
    model = folder / "model"
    if not model.exists():
        tiny.write_model(model, "olmoe")
    method = Method() if retain else Method(objective="gradient_ascent", attribution="affinity")
    return read_inputs(
        model,
        lines(folder / "f.jsonl", examples("forget", forget)),
        lines(folder / "r.jsonl", examples("retain")) if retain else None,
        lines(folder / "e.jsonl", evaluation) if evaluation else None,
        method,
        observer or Recorder(),
    )


def test_a_dense_model_is_refused_before_its_weights_are_read_where_experts_are_chosen(
    tmp_path: Path,
) -> None:
    model, forget = tiny.write_model(tmp_path / "model", "llama"), lines(tmp_path / "f.jsonl", examples("f"))
    for scope in ("seuf", "router_only"):
        method = Method.model_validate({"scope": scope, "router": "train"})
        with pytest.raises(ModelError, match="lora or full") as caught:
            read_inputs(model, forget, forget, None, method, Recorder())
        assert caught.value.code == "dense_model"
    for scope in ("lora", "full"):
        read = read_inputs(model, forget, forget, None, Method.model_validate({"scope": scope}), Recorder())
        assert read.facts.num_experts == 0


def facts(records: list[Any], side: str) -> set[str]:
    return {record.fact for record in records if record.fact.startswith(side)}


@pytest.mark.parametrize("given", [None, probes("forget") + probes("retain")])
def test_no_fact_is_on_two_sides(given: list[dict[str, Any]] | None, tmp_path: Path) -> None:
    """Trained facts choose no step, and neither is measured at the end."""
    recorder = Recorder()
    inputs = read(tmp_path, given, observer=recorder)
    assert inputs.retain is not None
    for side, train in (("forget", inputs.forget.train), ("retain", inputs.retain.train)):
        parts = [
            facts(part, side)
            for part in (train, list(inputs.selection_probes), list(inputs.test_probes))  # type: ignore[arg-type]
        ]
        assert all(parts)
        assert len(set.union(*parts)) == sum(map(len, parts)) == 40
    assert not recorder.codes


def test_without_retain_probes_the_retain_examples_bound_the_run(tmp_path: Path) -> None:
    recorder = Recorder()
    inputs = read(tmp_path, probes("forget"), observer=recorder)
    kept = [probe for probe in inputs.selection_probes if probe.set == "retain"]
    assert kept
    assert all(len(probe.choices) == 1 for probe in kept)
    assert all(len(probe.choices) == 2 for probe in inputs.selection_probes if probe.set == "forget")
    assert not recorder.codes


def test_a_run_that_nothing_bounds_says_so(tmp_path: Path) -> None:
    recorder = Recorder()
    assert {probe.set for probe in read(tmp_path, None, retain=False, observer=recorder).test_probes} == {
        "forget"
    }
    assert recorder.codes == ["no_retain_probes"]


@pytest.mark.parametrize("few", ["forget", "retain"])
def test_a_side_with_few_probes_has_them_in_every_part_and_says_so(few: str, tmp_path: Path) -> None:
    """Split together with the other side, three facts could all fall outside of the selection part."""
    counts = {"forget": 40, "retain": 40, few: 3}
    recorder = Recorder()
    inputs = read(tmp_path, [p for side, n in counts.items() for p in probes(side, n)], observer=recorder)
    for part in (inputs.selection_probes, inputs.test_probes):
        assert len([probe for probe in part if probe.set == few]) == 3
    assert recorder.codes == ["too_few_facts_to_split"]


def test_a_small_forget_set_says_that_it_is_measured_on_what_was_trained(tmp_path: Path) -> None:
    recorder = Recorder()
    inputs = read(tmp_path, None, forget=5, observer=recorder)
    assert len(inputs.forget.train) == len(facts(list(inputs.test_probes), "forget")) == 5  # type: ignore[arg-type]
    assert recorder.codes == ["too_few_facts_to_split"]


def test_each_side_is_sampled_for_the_looks_and_whole_for_the_end(tmp_path: Path) -> None:
    inputs = read(tmp_path, probes("forget", 1500) + probes("retain", 1500))
    for side in ("forget", "retain"):
        assert sum(probe.set == side for probe in inputs.selection_probes) == SELECTION_PROBES
        assert sum(probe.set == side for probe in inputs.test_probes) > SELECTION_PROBES


def test_the_fingerprint_is_of_every_file_and_of_the_method(tmp_path: Path) -> None:
    prints = [
        read(tmp_path, evaluation, forget=forget).fingerprint
        for evaluation, forget in ((None, 40), (probes("forget"), 40), (probes("forget", 41), 40), (None, 41))
    ]
    assert len(set(prints)) == 4
    assert read(tmp_path, None).fingerprint == prints[0]


def test_probes_that_are_cut_or_unusable_are_known_before_the_training(tmp_path: Path) -> None:
    recorder = Recorder()
    inputs = read(tmp_path, probes("forget", answer=" long" * 20) + probes("retain"))
    open_job(tmp_path / "model", inputs, Method(max_length=64), recorder)
    assert recorder.codes == ["probes_cut"]
    # An example of one byte and no prompt has nothing to predict; here it falls into the test part alone.
    one = read_inputs(
        tmp_path / "model",
        lines(tmp_path / "f.jsonl", examples("forget")),
        lines(tmp_path / "r.jsonl", [*examples("retain"), {"id": "short", "fact": "f18", "text": "x"}]),
        None,
        Method(),
        recorder,
    )
    assert "short" in {probe.id for probe in one.test_probes}
    with pytest.raises(DataError) as caught:
        open_job(tmp_path / "model", one, Method(), recorder)
    assert caught.value.code == "no_label_tokens"


def test_each_part_is_used_for_what_it_is_for(tmp_path: Path) -> None:
    """Losses see train facts, looks see selection facts, the end sees test facts."""
    inputs = read(tmp_path, probes("forget"))
    job = open_job(tmp_path / "model", inputs, Method(), Recorder())
    assert inputs.retain is not None
    tokenizer = tiny.build_tokenizer()
    assert job.data.forget == encode_examples(tokenizer, inputs.forget.train, 256)
    assert job.data.retain == encode_examples(tokenizer, inputs.retain.train, 256)
    assert [encoded.probe for encoded in job.selection_probes] == inputs.selection_probes
    assert [encoded.probe for encoded in job.test_probes] == inputs.test_probes


@pytest.mark.parametrize("attribution", ["contrast", "affinity"])
def test_experts_are_scored_on_the_training_parts(attribution: Attribution, tmp_path: Path) -> None:
    inputs = read(tmp_path, None)
    job = open_job(tmp_path / "model", inputs, Method(attribution=attribution), Recorder())
    forget, retain = (
        routing_statistics(job.view, [collate(rows)]).affinity for rows in (job.data.forget, job.data.retain)
    )
    expected = forget - retain if attribution == "contrast" else forget
    found = attribute(job)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-5, atol=1e-7)
    best = found.selection[0]
    assert best.score == pytest.approx(float(expected.max()), rel=1e-5)
    assert found.matrix[found.layers.index(best.layer), best.expert] == best.score
