"""A whole job on tiny random models: what changes on disk, what a resumed run ends with, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from seuf_core import Method, unlearn
from seuf_core.attribution.selection import SelectedExpert
from seuf_core.errors import Cancelled, DataError, MethodError, ModelError, WriteError
from seuf_core.observer import Silent
from tests import tiny

QUICK: dict[str, Any] = {
    "learning_rate": 1e-2,
    "steps": 6,
    "batch_size": 4,
    "evaluate_every": 2,
    "max_retain_drop": 1.0,
    "experts": 3,
}


class Recorder(Silent):
    """Keeps what it hears; cancels after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.phases: list[str] = []
        self.stop_after = stop_after

    def phase(self, name: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if name not in self.phases:
            self.phases.append(name)

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        json.dumps(data)
        self.events.append((type, data))

    def cancelled(self) -> bool:
        steps = sum(kind == "step" for kind, _ in self.events)
        return self.stop_after is not None and steps >= self.stop_after


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    def examples(kind: str) -> list[dict[str, Any]]:
        return [
            {"prompt": f"{kind} number {i} is", "completion": f" x{i * 7}y", "domain": kind}
            for i in range(40)
        ]

    return {
        "forget": lines(tmp_path / "forget.jsonl", examples("element")),
        "retain": lines(tmp_path / "retain.jsonl", examples("country")),
    }


def run(
    model: Path, sets: dict[str, Path], tmp_path: Path, name: str, observer: Any = None, **method: Any
) -> Any:
    return unlearn(
        model,
        sets["forget"],
        tmp_path / name,
        retain=sets.get("retain"),
        evaluation=sets.get("evaluation"),
        method=Method(**{**QUICK, **method}),
        work=tmp_path / f"work-{name}",
        observer=observer,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in folder.glob("model*.safetensors"):
        found |= load_file(shard)
    return found


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_only_the_selected_tensors_differ(
    family: str, preset: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", family)
    base = digests(model)
    result = run(model, sets, tmp_path, "out", preset=preset)
    before, after = tensors(model), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
    expected = {
        part.replace("E", str(t["expert"])).replace("L", str(t["layer"]))
        for t in result.selection
        for part in expected_names(family, router=preset == "paper")
    }
    # Every changed tensor was planned; an expert that no batch reached may have stayed as it was.
    assert changed
    assert changed <= expected
    assert set(load_file(tmp_path / "out" / "delta.safetensors")) == expected
    assert digests(model) == base, "the base model was written to"
    assert result.parameters_changed == sum(before[name].numel() for name in expected)
    assert result.parameters_total == sum(t.numel() for t in before.values())


def expected_names(family: str, *, router: bool) -> list[str]:
    if family == "mixtral":
        block, names = "block_sparse_moe", ("w1", "w2", "w3")
    else:
        block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    experts = [f"model.layers.L.{block}.experts.E.{name}.weight" for name in names]
    return experts + ([f"model.layers.L.{block}.gate.weight"] if router else [])


def tied(folder: Path, *names: str) -> Path:
    """A model whose output embedding is its input embedding, under these names in its file."""
    tiny.write_model(folder, "qwen2_moe", tie_word_embeddings=True, max_shard_size="1GB")
    held = load_file(folder / "model.safetensors")
    embedding = held.pop("model.embed_tokens.weight")
    save_file(
        {**held, **{name: embedding.clone() for name in names}},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


MODELS: dict[str, Any] = {
    "fp32": lambda folder: tiny.write_model(folder, "qwen2_moe"),
    "bf16": lambda folder: tiny.write_model(folder, "qwen2_moe", dtype=torch.bfloat16),
    "no pad token": lambda folder: tiny.write_model(
        folder, "qwen2_moe", pad_token_id=None, eos_token_id=[2, 5]
    ),
    "tied": lambda folder: tied(folder, "model.embed_tokens.weight"),
    "tied, held twice": lambda folder: tied(folder, "model.embed_tokens.weight", "lm_head.weight"),
    "tied, held as output": lambda folder: tied(folder, "lm_head.weight"),
}


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        ("fp32", "seuf"),
        ("bf16", "seuf"),
        ("no pad token", "seuf"),
        *((k, "full") for k in MODELS if k != "fp32"),
    ],
)
def test_the_checkpoint_loads_as_what_was_measured(
    kind: str, scope: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = MODELS[kind](tmp_path / "model")
    result = run(model, sets, tmp_path, "out", scope=scope)
    again = unlearn(
        tmp_path / "out",
        sets["forget"],
        None,
        retain=sets["retain"],
        method=Method(**QUICK),
        work=tmp_path / "w2",
    )

    def figure(metrics: list[dict[str, Any]], stage: str, name: str) -> float:
        [row] = [r for r in metrics if (r["stage"], r["name"], r["set"]) == (stage, name, "forget")]
        return float(row["value"])

    assert figure(again.metrics, "before", "probability") == pytest.approx(
        figure(result.metrics, "after", "probability"), rel=1e-5
    )
    if scope == "full":
        assert result.parameters_changed == result.parameters_total
    assert figure(result.metrics, "after", "probability") < figure(result.metrics, "before", "probability")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "qwen2_moe"


def test_masked_figures_do_not_depend_on_what_the_masked_experts_hold(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    """Router frozen: with the targets out of the routing, the unlearned model is the base with them out."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    result = run(model, sets, tmp_path, "out")
    by_stage: dict[str, list[Any]] = {}
    for row in result.metrics:
        by_stage.setdefault(row["stage"], []).append((row["set"], row["name"], round(row["value"], 6)))
    assert by_stage["before_masked"] == by_stage["after_masked"]
    assert by_stage["before"] != by_stage["after"]


def test_masked_figures_are_left_out_where_no_expert_would_be_left(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "mixtral")
    result = run(model, sets, tmp_path, "out", experts=3, spread="same_layer")
    assert {row["stage"] for row in result.metrics} == {"before", "after"}


# One selection after another, as no run of a random model counts as having forgotten.
GROWING: dict[str, Any] = {"experts": "auto", "coverage": 0.4, "max_experts": 3}


@pytest.mark.parametrize("stop_after", [1, 3, 4, 8])
def test_a_cancelled_run_continues_to_bit_identical_weights(
    stop_after: int, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    run(model, sets, tmp_path, "undisturbed", **GROWING)
    with pytest.raises(Cancelled):
        run(model, sets, tmp_path, "resumed", observer=Recorder(stop_after), **GROWING)
    assert not (tmp_path / "resumed").exists()
    recorder = Recorder()
    run(model, sets, tmp_path, "resumed", observer=recorder, **GROWING)
    steps = [data["step"] for kind, data in recorder.events if kind == "step"]
    assert len(steps) == 12 - stop_after, "the run began again instead of continuing"
    assert steps[0] == stop_after % 6 + 1
    delta = (tmp_path / "undisturbed" / "delta.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "delta.safetensors").read_bytes() == delta


def rungs(recorder: Recorder) -> list[dict[str, Any]]:
    return [data for kind, data in recorder.events if kind == "rung"]


def test_a_weaker_rate_is_tried_where_a_stronger_one_breaks_the_bound(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")

    def ladder(name: str, bound: float) -> tuple[list[float], float]:
        """The rates tried, and the one that won."""
        recorder = Recorder()
        rates = {"learning_rate": "auto", "learning_rate_ladder": (1e-4, 5e-2), "max_retain_drop": bound}
        result = run(model, sets, tmp_path, name, recorder, **rates)
        return [rung["learning_rate"] for rung in rungs(recorder)], result.chosen["learning_rate"]

    # Within the bound from end to end: the weaker rate could only get less far.
    assert ladder("wide", 1.0) == ([5e-2], 5e-2)
    # The second of three looks is past the bound, the third is the best of all.
    assert ladder("narrow", 1e-4) == ([5e-2, 1e-4], 5e-2)
    # The same, where that is enough.
    monkeypatch.setattr("seuf_core.search.FORGOTTEN", 1e-3)
    assert ladder("enough", 1e-4) == ([5e-2], 5e-2)


def test_the_weaker_rate_wins_where_no_step_of_the_stronger_is_within_the_bound(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    rates = {"learning_rate": "auto", "learning_rate_ladder": (1e-2, 1e-4), "max_retain_drop": 0.0}
    recorder = Recorder()
    result = run(model, sets, tmp_path, "out", recorder, **rates)
    assert [rung["step"] for rung in rungs(recorder)] == [0, 6]
    assert result.chosen["learning_rate"] == 1e-4


def test_experts_are_added_while_too_little_is_forgotten(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    result = run(model, sets, tmp_path, "out", recorder, **GROWING)
    tried = [[(t["layer"], t["expert"]) for t in rung["experts"]] for rung in rungs(recorder)]
    assert [len(experts) for experts in tried] == [1, 3]
    assert tried[0] == tried[1][:1]
    # Both are within the bound; the larger set got further. It is what was measured, written and reported.
    scores = [rung["forget_choice"] for rung in rungs(recorder)]
    assert scores[1] < scores[0]
    assert result.chosen["forget_choice"] == scores[1]
    assert [(t["layer"], t["expert"]) for t in result.selection] == tried[1]
    assert result.attribution["selection"] == result.selection
    announced = [data for kind, data in recorder.events if kind == "selection"]
    assert announced[-1]["experts"] == result.selection
    assert announced[-1]["coverage"] == result.attribution["coverage"] > announced[0]["coverage"] >= 0.4
    # Where the first set is enough, no second one is trained.
    monkeypatch.setattr("seuf_core.search.FORGOTTEN", scores[0])
    recorder = Recorder()
    result = run(model, sets, tmp_path, "first", recorder, **GROWING)
    assert [len(rung["experts"]) for rung in rungs(recorder)] == [len(result.selection)] == [1]


def test_a_smaller_set_wins_where_more_experts_did_not_help(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    result = run(model, sets, tmp_path, "out", recorder, **{**GROWING, "max_experts": 6})
    scores = [rung["forget_choice"] for rung in rungs(recorder)]
    assert scores[-1] > min(scores), "the last set is the best, so this shows nothing"
    winner = rungs(recorder)[scores.index(min(scores))]
    assert result.selection == winner["experts"]
    assert result.chosen["forget_choice"] == min(scores)


def test_fixed_strength_takes_the_last_step_of_the_first_selection(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    # A bound that no step keeps does not matter: nothing is chosen.
    result = run(model, sets, tmp_path, "out", recorder, **GROWING, strength="fixed", max_retain_drop=0.0)
    assert (len(rungs(recorder)), len(result.selection), result.chosen["step"]) == (1, 1, 6)
    last = [data for kind, data in recorder.events if kind == "look"][-1]
    assert result.chosen["forget_choice"] == last["forget_choice"]


def test_fixed_strength_that_breaks_the_model_is_an_error(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe", dtype=torch.float16)
    fields = {"objective": "gradient_ascent", "learning_rate": 1.0, "steps": 12}
    with pytest.raises(MethodError) as caught:
        run(model, sets, tmp_path, "out", **fields, strength="fixed")
    assert caught.value.code == "diverged"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("retain_loss", ["none", "cross_entropy"])
def test_a_retain_set_without_a_retain_term_only_measures(
    retain_loss: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    run(model, sets, tmp_path, "out", recorder, retain_loss=retain_loss)
    terms = [data["retain_loss"] for kind, data in recorder.events if kind == "step"]
    assert all((term > 0) == (retain_loss != "none") for term in terms)


@pytest.mark.parametrize("scope", ["seuf", "random_expert", "full"])
@pytest.mark.parametrize(
    "objective", ["gradient_ascent", "gradient_difference", "npo", "rmu", "adaptive_rmu"]
)
def test_every_objective_runs_in_every_scope_that_has_it(
    scope: str, objective: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    if scope == "full" and "rmu" in objective:
        with pytest.raises(ValueError, match="no target layer"):
            Method(scope=scope, objective=objective)
        return
    model = tiny.write_model(tmp_path / "model", "olmoe")
    recorder = Recorder()
    # Steering hidden states takes larger steps than a likelihood to move what a random model says.
    rate = 5e-2 if "rmu" in objective else 1e-2
    result = run(
        model,
        sets,
        tmp_path,
        "out",
        observer=recorder,
        scope=scope,
        objective=objective,
        router="train",
        learning_rate=rate,
    )
    assert recorder.phases == [
        "validating",
        *(["attributing"] if scope != "full" else []),
        "unlearning",
        "evaluating",
        "publishing",
    ]
    assert result.chosen["step"] > 0
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_random_expert_is_another_expert_of_the_same_layer(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    chosen = run(model, sets, tmp_path, "a", experts=2).selection
    drawn = run(model, sets, tmp_path, "b", experts=2, scope="random_expert").selection
    assert [t["layer"] for t in chosen] == [t["layer"] for t in drawn]
    assert all(a["expert"] != b["expert"] for a, b in zip(chosen, drawn, strict=True))


def test_a_set_too_small_to_split_says_so(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    small = lines(tmp_path / "small.jsonl", [{"prompt": "a is", "completion": " b"}] * 1)
    recorder = Recorder()
    run(model, {**sets, "forget": small}, tmp_path, "out", observer=recorder)
    assert ("warning", "too_few_facts_to_split") in [(t, d.get("code")) for t, d in recorder.events]


def test_another_base_of_the_same_shape_is_trained_from_the_beginning(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    """The work folder of one base must not serve another."""
    first = tiny.write_model(tmp_path / "first", "qwen2_moe", seed=0)
    run(first, sets, tmp_path, "out")
    other = tiny.write_model(tmp_path / "other", "qwen2_moe", seed=1)
    recorder = Recorder()
    (tmp_path / "out").rename(tmp_path / "moved")
    run(other, sets, tmp_path, "out", observer=recorder)  # the same work folder
    assert [d["step"] for kind, d in recorder.events if kind == "step"][:1] == [1]


def test_other_experts_are_trained_from_the_beginning(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job, resumed where rounding selects other experts: the old values fit no parameter."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    with pytest.raises(Cancelled):
        run(model, sets, tmp_path, "out", Recorder(3))
    others = (SelectedExpert(1, 0, 0.5), SelectedExpert(2, 1, 0.4))
    monkeypatch.setattr("seuf_core.pipeline.selections", lambda *_, **__: (others,))
    recorder = Recorder()
    run(model, sets, tmp_path, "out", recorder)
    assert [d["step"] for kind, d in recorder.events if kind == "step"][:1] == [1]


def test_an_output_that_exists_is_refused_before_the_training(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    (tmp_path / "out").mkdir()
    recorder = Recorder()
    with pytest.raises(WriteError) as caught:
        run(model, sets, tmp_path, "out", observer=recorder)
    assert caught.value.code == "output_exists"
    assert not recorder.phases


def warnings(recorder: Recorder) -> list[str]:
    return [data["code"] for kind, data in recorder.events if kind == "warning"]


def test_a_run_that_nothing_bounds_says_so(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    recorder = Recorder()
    only = {"forget": sets["forget"]}
    run(model, only, tmp_path, "out", recorder, objective="gradient_ascent", attribution="affinity")
    assert warnings(recorder) == ["no_retain_probes"]


def test_a_broken_model_is_not_a_forgetful_one(sets: dict[str, Path], tmp_path: Path) -> None:
    """No retain probes bound this ascent, and its rate breaks the model: what is published gives numbers."""
    model = tiny.write_model(tmp_path / "model", "qwen2_moe", dtype=torch.bfloat16)
    recorder = Recorder()
    fields = {"objective": "gradient_ascent", "scope": "full", "learning_rate": 1.0, "steps": 12}
    result = run(model, {"forget": sets["forget"]}, tmp_path, "out", recorder, **fields)
    assert all(row["value"] == row["value"] for row in result.metrics)


def test_refusals_before_anything_is_written(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    dense = tiny.write_model(tmp_path / "dense", "llama")
    cases: list[tuple[type[Exception], str, dict[str, Path], Path, dict[str, Any]]] = [
        (MethodError, "retain_set_required", {"forget": sets["forget"]}, model, {}),
        (ModelError, "dense_model", sets, dense, {}),
        (ModelError, "model_not_found", sets, tmp_path / "nowhere", {}),
        (MethodError, "too_many_experts", sets, model, {"experts": 40}),
        (
            DataError,
            "no_forget_probes",
            {
                **sets,
                "evaluation": lines(
                    tmp_path / "e.jsonl",
                    [{"prompt": "a", "choices": ["b", "c"], "answer": 0, "set": "retain"}],
                ),
            },
            model,
            {},
        ),
        (
            DataError,
            "invalid_set",
            {**sets, "forget": lines(tmp_path / "bad.jsonl", [{"nonsense": 1}])},
            model,
            {},
        ),
    ]
    for error, code, given, folder, method in cases:
        with pytest.raises(error) as caught:
            run(folder, given, tmp_path, "out", **method)
        assert caught.value.code == code  # type: ignore[attr-defined]
        assert caught.value.fix  # type: ignore[attr-defined]
        assert not (tmp_path / "out").exists()


def test_nothing_forgotten_is_an_error_and_not_a_checkpoint(sets: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    with pytest.raises(MethodError) as caught:
        run(model, sets, tmp_path, "out", learning_rate=1e-12, max_retain_drop=0.0)
    assert caught.value.code == "nothing_forgotten"
    assert not (tmp_path / "out").exists()
