"""A model whose layers are read when they are needed, against from_pretrained: every value to the last bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from seuf_core.checkpoint.index import read_index
from seuf_core.errors import ModelError
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.passes import embed, run_layer, tail
from seuf_core.moe.skeleton import open_model
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of


def pretrained(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        # Mapped files begin anywhere, and matmuls round by how their operands are aligned.
        parameter.data = parameter.data.clone()
    return model


def tensors(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, str, torch.dtype, bool]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (value, type(value).__name__, value.dtype, value.requires_grad) for name, value in named}


def assert_same(view: MoEView, model: PreTrainedModel) -> None:
    found, wanted = tensors(view.model), tensors(model)
    assert list(found) == list(wanted)
    for name, (value, *facts) in wanted.items():
        assert found[name][1:] == tuple(facts), name
        assert torch.equal(found[name][0], value), name
    assert set(view.model.state_dict()) == set(model.state_dict())
    assert view.model.dtype == model.dtype
    assert view.model.device == model.device
    assert view.model.training == model.training is False


def in_layers(view: MoEView) -> list[torch.Tensor]:
    """All that a layer keeps on disk."""
    return [tensor for layer in view.model.get_decoder().layers for tensor in layer.state_dict().values()]


@torch.no_grad()
def logits_layer_by_layer(view: MoEView) -> torch.Tensor:
    given = batch()
    flow, routed = embed(view, given)
    for index in range(view.num_layers):
        with view.weights.loaded(index):
            flow = run_layer(view, index, flow, routed)
    return tail(view, flow.states.flatten(0, 1)).view(*given.input_ids.shape, -1)


@torch.no_grad()
def check(folder: Path) -> None:
    """Streamed, held, and dropped again."""
    view, model = open_model(folder), pretrained(folder)
    # A job computes the experts of a 16 bit model in products of its own (tests/families/test_grouped.py).
    model.set_experts_implementation(view.model.config._experts_implementation)
    wanted = logits_of(model, batch())
    assert all(tensor.is_meta for tensor in in_layers(view))
    assert torch.equal(logits_layer_by_layer(view), wanted)
    view.weights.hold(range(view.num_layers))
    assert_same(view, model)
    assert torch.equal(logits_of(view.model, batch()), wanted)
    view.weights.hold(())
    assert all(tensor.is_meta for tensor in in_layers(view))


@EVERY_FAMILY
def test_it_is_what_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    """In bf16, in which some families keep a few tensors in fp32."""
    check(tiny.write_model(tmp_path, family, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", [*tiny.MOE_FAMILIES, "gpt_oss", *tiny.DENSE])
@pytest.mark.parametrize("shards", ["40KB", "1GB"])
def test_in_fp32_and_dense_models_too(family: str, shards: str, tmp_path: Path) -> None:
    check(tiny.write_model(tmp_path, family, max_shard_size=shards))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_cast_to_the_dtype_of_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    """Flint keeps some tensors in fp32, whatever the rest is in; here the files have all of them in fp32."""
    folder = tiny.write_model(tmp_path, "flint")
    edit_config(folder, dtype=str(dtype).removeprefix("torch."))
    view, model = open_model(folder), pretrained(folder)
    view.weights.hold(range(view.num_layers))
    assert_same(view, model)
    assert view.model.dtype == dtype


@pytest.mark.parametrize("family", ["olmoe", "lfm2_moe"])
def test_tied_embeddings_are_one_tensor(family: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, family, tie_word_embeddings=True)
    check(folder)
    model = open_model(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_names_go_back_to_those_on_disk(tmp_path: Path) -> None:
    """A writer asks the model what its tensors are called in the files."""
    for family in ("ernie4_5_moe", "hunyuan_v1_moe", "kimi_linear"):
        folder = tiny.write_model(tmp_path / family, family)
        view, on_disk = open_model(folder), read_index(folder).tensors
        view.weights.hold(range(view.num_layers))
        wanted = all_tensors(moe_view(pretrained(folder)), on_disk)
        found = all_tensors(view, on_disk)
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_bias_that_chooses_is_there_when_its_layer_is(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "deepseek_v3")
    view, model = open_model(folder), moe_view(pretrained(folder))
    with view.weights.loaded(2):
        found, wanted = view.layer(2).selection_bias, model.layer(2).selection_bias
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)


def test_a_dropped_layer_leaves_no_tensor_behind(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "deepseek_v3")
    view = open_model(folder)
    for _ in range(2):
        logits_layer_by_layer(view)
        with view.weights.loaded(1):
            layer = view.model.get_decoder().layers[1]
            kept = [weakref.ref(tensor) for tensor in layer.state_dict(keep_vars=True).values()]
        view.weights.hold(())
        assert kept
        assert [reference for reference in kept if reference() is not None] == []


def test_a_model_whose_files_lack_a_tensor_is_refused(tmp_path: Path) -> None:
    """from_pretrained would fill it with random numbers."""
    folder = tiny.write_model(tmp_path, "olmoe", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.self_attn.q_proj.weight"
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match=lost) as caught:
        open_model(folder)
    assert caught.value.code == "missing_tensors"


@pytest.mark.parametrize(
    ("field", "lost"),
    [("num_hidden_layers", "model.layers.3"), ("num_experts", "down_proj"), ("hidden_size", "lm_head")],
)
def test_a_config_of_another_model_is_refused(field: str, lost: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "olmoe")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, **{field: config[field] + (4 if field == "hidden_size" else 1)})
    with pytest.raises(ModelError, match=lost) as caught:
        open_model(folder).weights.hold(range(3))
    assert caught.value.code in ("missing_tensors", "mismatched_tensor")
