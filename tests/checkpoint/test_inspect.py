"""What a folder is found to be, against the model itself; and each reason to refuse one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.errors import ModelError
from seuf_core.families import FAMILIES, family_of
from seuf_core.moe.view import moe_view
from tests import tiny


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_facts_are_those_of_the_model(models, family):
    facts = inspect_model(models(family))
    model = tiny.build_model(family)
    view = moe_view(model)
    assert facts.model_type == family
    assert facts.path == models(family)
    assert (facts.num_layers, facts.moe_layers) == (model.config.num_hidden_layers, view.layer_indices)
    assert facts.num_experts == len(view.layers[0].experts.gate_up_proj) == len(view.layers[0].router_weight)
    assert facts.num_experts_per_tok == view.num_experts_per_tok == 2
    stored = model.state_dict()
    assert facts.parameters == sum(tensor.numel() for tensor in stored.values())
    assert (facts.bytes, facts.dtype) == (4 * facts.parameters, "F32")


@pytest.mark.parametrize("family", tiny.DENSE)
def test_a_dense_model_has_facts_and_no_experts(models, family):
    facts = inspect_model(models(family))
    assert (facts.model_type, facts.num_layers) == (family, 3)
    assert (facts.moe_layers, facts.num_experts, facts.num_experts_per_tok) == ((), 0, 0)
    assert facts.parameters == sum(p.numel() for p in tiny.build_model(family).parameters())


def test_a_family_of_experts_may_have_a_dense_model(tmp_path):
    """Granite's hybrid family and Jamba have some: num_local_experts 0, num_experts 1."""
    facts = inspect_model(tiny.write_model(tmp_path / "granite", "granitemoehybrid", num_local_experts=0))
    assert (facts.moe_layers, facts.num_experts) == ((), 0)
    facts = inspect_model(tiny.write_model(tmp_path / "jamba", "jamba", num_experts=1))
    assert (facts.moe_layers, facts.num_experts) == ((), 0)


def test_only_language_models(own):
    error = _refused(_edit_config(own("llama"), architectures=["LlamaForSequenceClassification"]))
    assert error.code == "not_a_language_model"
    assert "LlamaForSequenceClassification" in error.message


def test_dtype_of_a_bfloat16_model(tmp_path):
    facts = inspect_model(tiny.write_model(tmp_path / "m", "mixtral", dtype=torch.bfloat16))
    assert (facts.dtype, facts.bytes) == ("BF16", 2 * facts.parameters)


def test_digest_is_of_the_content_and_not_of_the_place(models, own, tmp_path):
    assert inspect_model(own("olmoe")).digest == inspect_model(models("olmoe")).digest
    other = tiny.write_model(tmp_path / "other", "olmoe", seed=1)
    assert inspect_model(other).digest != inspect_model(models("olmoe")).digest


def test_digest_sees_one_trained_tensor(own):
    folder = own("olmoe")
    before = inspect_model(folder).digest
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if "experts" in name)
    tensors[name] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})
    assert inspect_model(folder).digest != before


def _refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        inspect_model(folder)
    return caught.value


def _edit_config(folder: Path, **fields: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_not_a_folder_and_not_a_model(tmp_path):
    assert _refused(tmp_path / "nowhere").code == "model_not_found"
    assert _refused(tmp_path).code == "not_a_model"
    (tmp_path / "config.json").write_text("{")
    assert _refused(tmp_path).code == "not_a_model"
    (tmp_path / "config.json").write_text("{}")
    assert _refused(tmp_path).code == "not_a_model"


def test_pickled_weights_only(own):
    folder = own("olmoe")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    error = _refused(folder)
    assert error.code == "no_safetensors"
    assert error.fix is not None
    assert "save_pretrained" in error.fix


def test_an_unknown_family_with_experts_lists_the_known(own):
    error = _refused(_edit_config(own("olmoe"), model_type="brand_new_moe"))
    assert error.code == "unknown_architecture"
    assert "mixtral" in str(error)


QUANTISED = {  # quant_method as each library writes it -> what the fix must say
    "mxfp4": "seuf_core.checkpoint.dequantise",
    "fp8": "seuf_core.checkpoint.dequantise",
    "fbgemm_fp8": "16 or 32 bit checkpoint",
    "gptq": "16 or 32 bit checkpoint",
    "awq": "16 or 32 bit checkpoint",
    "bitsandbytes": "16 or 32 bit checkpoint",
    "compressed-tensors": "16 or 32 bit checkpoint",
    "torchao": "16 or 32 bit checkpoint",
    "hqq": "16 or 32 bit checkpoint",
}


@pytest.mark.parametrize("method", sorted(QUANTISED))
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_quantised_by_config_is_refused_by_name(own, family, method):
    error = _refused(_edit_config(own(family), quantization_config={"quant_method": method}))
    assert error.code == "quantised"
    assert f"({method})" in error.message
    assert error.fix is not None
    assert QUANTISED[method] in error.fix


def test_quantised_by_a_config_that_names_no_method(own):
    error = _refused(_edit_config(own("olmoe"), quantization_config={"bits": 4}))
    assert (error.code, "no quant_method" in error.message) == ("quantised", True)


@pytest.mark.parametrize("everything", [False, True])
def test_quantised_by_dtype(own, everything):
    """One expert, in a model whose config says nothing; and a whole dense model."""
    folder = own("llama" if everything else "mixtral")
    name = family_of("mixtral").expert_names(2, 3)["down_proj"][0]
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for key in tensors:
            if everything or key == name:
                tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        save_file(tensors, shard)
    error = _refused(folder)
    assert error.code == "quantised"
    assert "F8_E4M3" in error.message


def test_experts_that_are_elsewhere(own):
    error = _refused(_edit_config(own("olmoe"), num_experts=9))
    assert error.code == "unexpected_layout"
    assert "experts.8" in str(error)
    error = _refused(_edit_config(own("granitemoe"), num_local_experts=9))
    assert (error.code, "input_linear.weight[8]" in error.message) == ("unexpected_layout", True)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_a_lost_router_does_not_make_a_layer_dense(own, layers):
    folder = own("olmoe", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    for layer in layers:
        del tensors[f"model.layers.{layer}.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors")
    error = _refused(folder)
    assert (error.code, f"model.layers.{layers[0]}.mlp.gate" in error.message) == ("unexpected_layout", True)


def test_layers_past_the_last_are_not_the_models(own):
    """DeepSeek-V3 and GLM-4.5 publish a layer of multi-token prediction with experts of its own."""
    folder = own("deepseek_v3", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name.replace("layers.3.", "layers.4."): t.clone()
        for name, t in tensors.items()
        if "layers.3." in name
    }
    save_file(tensors, folder / "model.safetensors")
    assert inspect_model(folder).moe_layers == (1, 2, 3)


def test_the_service_side_imports_no_torch():
    edge = ("checkpoint.inspect", "checkpoint.manifest", "data.records", "families")
    imports = ", ".join(f"seuf_core.{module}" for module in edge)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'numpy', 'safetensors'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
