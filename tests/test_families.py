"""Every row of seuf_core.families against the model transformers builds and the files it writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seuf_core.errors import ModelError
from seuf_core.families import DOWN_PROJ, FAMILIES, GATE_UP_PROJ, ROUTER, family_of, has_experts
from tests import tiny


@pytest.fixture(scope="module", params=tiny.MOE_FAMILIES)
def folder(request, tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("families") / request.param, request.param, seed=3)


def _config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def test_tiny_covers_every_row():
    assert set(tiny.MOE_FAMILIES) == set(FAMILIES)


def test_names_on_disk_hold_the_fused_tensors_of_memory(folder):
    family, config = family_of(folder.name), _config(folder)
    memory = tiny.build_model(folder.name, seed=3).state_dict()
    disk = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    for layer in family.moe_layers(config):
        assert torch.equal(disk[family.router_name(layer)], memory[ROUTER.format(layer=layer)])
        for expert in range(family.num_experts(config)):
            names = family.expert_names(layer, expert)
            gate_up = torch.cat([disk[names.gate], disk[names.up]])
            assert torch.equal(gate_up, memory[GATE_UP_PROJ.format(layer=layer)][expert])
            assert torch.equal(disk[names.down], memory[DOWN_PROJ.format(layer=layer)][expert])


@pytest.mark.parametrize(
    ("model_type", "fields", "layers"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}, (1,)),
        ("qwen3_moe", {"mlp_only_layers": [1]}, (0, 2)),
        ("deepseek_v2", {"first_k_dense_replace": 2}, (2, 3)),
        ("deepseek_v2", {"first_k_dense_replace": 0}, (0, 1, 2, 3)),
        ("olmoe", {}, (0, 1, 2)),
        ("mixtral", {}, (0, 1, 2)),
    ],
)
def test_moe_layers_are_the_layers_that_have_experts(model_type, fields, layers):
    model = tiny.build_model(model_type, **fields)
    built = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert family_of(model_type).moe_layers(model.config.to_dict()) == built == layers


@pytest.mark.parametrize("renormalise", [True, False])
def test_router_scores_as_the_row_says(folder, renormalise):
    config = tiny.build_model(folder.name).config
    fields = {"norm_topk_prob": renormalise} if hasattr(config, "norm_topk_prob") else {}
    model = tiny.build_model(folder.name, seed=3, **fields)
    family, layer = family_of(folder.name), model.model.layers[-1]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, weights, indices = layer.mlp.gate(hidden)[:3]
    assert family.score == "softmax"
    assert layer.mlp.gate.weight.std() > 0.1  # not a test of zeros
    logits = hidden @ layer.mlp.gate.weight.detach().T  # some routers return them already softmaxed
    gates = logits.softmax(-1).gather(-1, indices)
    if family.renormalises(model.config.to_dict()):
        gates = gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, gates)


def test_published_and_resaved_names_of_the_expert_count():
    family = family_of("qwen3_moe")
    assert family.num_experts({"num_experts": 128}) == family.num_experts({"num_local_experts": 128}) == 128


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ModelError) as caught:
        family_of("gpt_oss")
    assert caught.value.code == "unknown_architecture"
    assert all(known in str(caught.value) for known in FAMILIES)


@pytest.mark.parametrize("value", [None, 0, -1, "8", True, 2.5])
def test_a_count_that_is_no_count_names_the_key(value):
    with pytest.raises(ModelError, match="'num_experts'") as caught:
        family_of("olmoe").num_experts({"num_experts": value})
    assert caught.value.code == "incomplete_config"


def test_has_experts_reads_any_family():
    assert has_experts({"n_routed_experts": 64})
    assert not has_experts({"hidden_size": 64, "num_experts": 0})
