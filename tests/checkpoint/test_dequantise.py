"""Quantised checkpoints, made by hand in the formats models are published in, and what they are afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seuf_core.checkpoint.dequantise import dequantise
from seuf_core.checkpoint.inspect import DEQUANTISABLE, inspect_model
from seuf_core.errors import ModelError, SeufError
from tests import tiny

# The 16 values of 4 bits with 2 of exponent and 1 of mantissa (OCP Microscaling Formats, 5.3.3).
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FP4 = torch.tensor([*FP4, *(-value for value in FP4)])


def quantised(folder: Path, method: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny checkpoint in fp8 (as DeepSeek-V3) or MXFP4 (as gpt-oss), and its weights in 16 bits by disk name."""
    family, shape = ("deepseek_v3", {}) if method == "fp8" else ("gpt_oss", {"intermediate_size": 32})
    tiny.write_model(folder, family, dtype=torch.bfloat16, max_shard_size="1GB", **shape)
    wanted = load_file(folder / "model.safetensors")
    stored = dict(wanted)
    noise = torch.Generator().manual_seed(0)
    for name, tensor in wanted.items():
        if method == "fp8" and name.endswith("proj.weight") and tensor.dim() == 2:
            low = tensor.to(torch.float8_e4m3fn)
            stored |= {name: low, name.replace(".weight", ".weight_scale_inv"): torch.full((1, 1), 2.0)}
            wanted[name] = low.to(torch.bfloat16) * 2
        elif method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, rows, columns = tensor.shape
            blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), generator=noise).to(
                torch.uint8
            )
            scales = torch.full((experts, columns, rows // 32), 125, dtype=torch.uint8)  # 2 ** (125 - 127)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            pairs = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1) * 2.0**-2
            wanted[name] = pairs.flatten(2).transpose(1, 2).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fp8 = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config["quantization_config"] = {"quant_method": method, **(fp8 if method == "fp8" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, wanted


@pytest.mark.parametrize("method", sorted(DEQUANTISABLE))
def test_the_bfloat16_form_holds_the_same_numbers_and_can_be_used(tmp_path: Path, method: str) -> None:
    folder, wanted = quantised(tmp_path / "base", method)
    with pytest.raises(ModelError, match=rf"\({method}\).*dequantise") as caught:
        inspect_model(folder)
    assert caught.value.code == "quantised"
    dequantise(folder, tmp_path / "out")
    facts = inspect_model(tmp_path / "out")
    assert (facts.dtype, facts.num_experts) == ("BF16", 8)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Où ?", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


def test_other_methods_and_existing_folders_are_refused(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path / "base", "mxfp4")
    (tmp_path / "out").mkdir()
    with pytest.raises(SeufError) as caught:
        dequantise(folder, tmp_path / "out")
    assert caught.value.code == "output_exists"
    plain = tiny.write_model(tmp_path / "plain", "olmoe")
    run = [sys.executable, "-m", "seuf_core.checkpoint.dequantise", str(plain), str(tmp_path / "b")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not quantised in one of fp8, mxfp4" in done.stderr
    assert not (tmp_path / "b").exists()
