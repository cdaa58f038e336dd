"""A checkpoint of random weights is what transformers itself would have written for that config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.hooks import affinity
from benchmarks.setting import encoded
from benchmarks.shapes import SHAPES, meta_view, tiny_fields, write_shape
from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.moe.view import moe_view


def names_of(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", list(SHAPES))
def test_transformers_opens_it_and_would_write_the_same_names(name: str, tmp_path: Path) -> None:
    folder = write_shape(name, tmp_path / "written", shard_bytes=100_000, **tiny_fields(name))
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == SHAPES[name].dtype
    model.save_pretrained(tmp_path / "saved")
    assert names_of(folder) == names_of(tmp_path / "saved")
    facts = inspect_model(folder)
    assert facts.moe_layers == moe_view(model).layer_indices


@pytest.mark.parametrize("name", list(SHAPES))
def test_losses_are_finite_and_experts_differ(name: str, tmp_path: Path) -> None:
    folder = write_shape(name, tmp_path, **tiny_fields(name))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    text = AutoTokenizer.from_pretrained(folder)("t5 t511 t7 t8", return_tensors="pt")
    assert text["input_ids"].tolist() == [[5, 511, 7, 8]]
    output = model(**text, labels=text["input_ids"])
    # Nothing was learned: near the logarithm of the vocabulary.
    assert 5.5 < float(output.loss.detach()) < 7
    layer = moe_view(model).layers[-1]
    weights = layer.experts.down_proj.detach().float().flatten(1)
    similar = torch.corrcoef(weights) - torch.eye(len(weights))
    assert float(similar.abs().max()) < 0.1
    assert float(weights.std()) == pytest.approx(0.02, rel=0.1)


def published(name: str) -> int:
    return sum(p.numel() for p in meta_view(SHAPES[name].make_config()).model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the publishers count them; the first two are ours.
    [
        ("olmoe-125m", 125e6),
        ("qwen2-moe-1b", 1.05e9),
        ("olmoe-1b-7b", 6.92e9),
        ("qwen1.5-moe-a2.7b", 14.3e9),
        ("deepseek-v2-lite", 15.7e9),
        ("qwen3-30b-a3b", 30.5e9),
    ],
)
def test_full_shapes_have_as_many_parameters_as_the_published_models(name: str, parameters: float) -> None:
    assert published(name) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_sharp_layer_has_the_highest_affinity(layer: int, tmp_path: Path) -> None:
    folder = write_shape("olmoe-125m", tmp_path, sharp_layer=layer, **tiny_fields("olmoe-125m"))
    view = moe_view(AutoModelForCausalLM.from_pretrained(folder).eval())
    scores = affinity(view, encoded(512, 16, 32, seed=3), tokens_per_batch=256)
    assert int(scores.argmax()) // 8 == layer
