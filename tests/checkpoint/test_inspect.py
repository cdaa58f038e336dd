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
from seuf_core.families import family_of
from tests import tiny


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_facts_are_those_of_the_model(models, family):
    facts = inspect_model(models(family))
    model = tiny.build_model(family)
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert facts.model_type == family
    assert facts.path == models(family)
    assert (facts.num_layers, list(facts.moe_layers)) == (len(model.model.layers), layers)
    assert facts.num_experts == model.model.layers[-1].mlp.experts.gate_up_proj.shape[0]
    assert facts.num_experts_per_tok == model.config.num_experts_per_tok
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.bytes, facts.dtype) == (4 * facts.parameters, "F32")


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


def test_dense_models(own):
    assert _refused(own("llama")).code == "dense_model"
    assert _refused(_edit_config(own("qwen2_moe"), mlp_only_layers=[0, 1, 2])).code == "dense_model"


def test_an_unknown_family_with_experts_lists_the_known(own):
    error = _refused(_edit_config(own("olmoe"), model_type="brand_new_moe"))
    assert error.code == "unknown_architecture"
    assert "mixtral" in str(error)


def test_quantised_by_config_or_by_dtype(own):
    assert (
        _refused(_edit_config(own("olmoe"), quantization_config={"quant_method": "fp8"})).code == "quantised"
    )
    folder = own("mixtral")
    name = family_of("mixtral").expert_names(2, 3).down
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            save_file(tensors, shard)
    assert _refused(folder).code == "quantised"


def test_experts_that_are_elsewhere(own):
    error = _refused(_edit_config(own("olmoe"), num_experts=9))
    assert error.code == "unexpected_layout"
    assert "experts.8" in str(error)


def test_the_service_side_imports_no_torch():
    edge = ("checkpoint.inspect", "checkpoint.manifest", "data.records", "families")
    imports = ", ".join(f"seuf_core.{module}" for module in edge)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'numpy', 'safetensors'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
