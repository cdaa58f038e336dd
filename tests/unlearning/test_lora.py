"""Adapters as peft computes and merges them, and a model that is its own whenever they are not attached."""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest
import torch
from torch import nn

from seuf_core.errors import ModelError
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.routing import experts_masked
from seuf_core.moe.view import moe_view
from seuf_core.unlearning.lora import LoraScope, linear_layers
from seuf_core.unlearning.scopes import assign, snapshot
from tests import tiny
from tests.moe.test_routing import random_batch, run

FAMILIES = pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "mixtral", "llama"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
RANK, ALPHA = 3, 12.0


def lora(model: Any, seed: int = 0, **fields: Any) -> LoraScope:
    return LoraScope(moe_view(model), rank=RANK, alpha=ALPHA, seed=seed, **fields)


def train(scope: LoraScope, seed: int = 0) -> None:
    """Adapters as they might be after some training: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in scope.named_parameters().values():
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.1)


class Plain(nn.Module):
    """A model that peft does not know as one of transformers.

    Of DeepSeek-V2 it would take the dense layer's gate_proj for one of the fused experts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def as_peft(model: Any, scope: LoraScope) -> Any:
    """A copy of the model with the same adapters by get_peft_model."""
    targets = list(linear_layers(moe_view(model)))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]
    base = copy.deepcopy(model)
    theirs = peft.get_peft_model(Plain(base) if model.config.model_type == "deepseek_v2" else base, config)  # type: ignore[arg-type]
    own = scope.named_parameters()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                key = name.removeprefix("base_model.model.").removeprefix("inner.")
                key = key.removesuffix(".default.weight")
                parameter.copy_(own.pop(key))
    assert not own, "peft adapts other layers"
    return theirs


@FAMILIES
@DTYPES
def test_forward_and_merge_are_those_of_peft(family: str, dtype: torch.dtype) -> None:
    model = tiny.build_model(family).to(dtype)
    scope, batch = lora(model), random_batch()
    train(scope)
    theirs = as_peft(model, scope)
    with scope.attached():
        attached = run(model, batch)
    assert torch.equal(attached, run(theirs, batch))
    scope.merge()
    unloaded = theirs.merge_and_unload()
    merged = getattr(unloaded, "inner", unloaded).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())
    if dtype == torch.float32:
        torch.testing.assert_close(run(model, batch), attached, rtol=1e-3, atol=1e-4)


def test_the_merged_weight_worked_by_hand() -> None:
    """alpha / r = 12 / 3 = 4 times B A."""
    model = tiny.build_model("llama")
    scope = lora(model)
    q_proj = model.model.layers[0].self_attn.q_proj
    base = q_proj.weight.detach().clone()
    leaves = scope.named_parameters()
    up, down = (leaves[f"model.layers.0.self_attn.q_proj.lora_{side}"] for side in "BA")
    assert (down.shape, up.shape) == ((3, 32), (32, 3))
    with torch.no_grad():
        up[5, 1], down[:] = 0.5, 0
        down[1, 7] = 0.25
    scope.merge()
    expected = base.clone()
    expected[5, 7] += 4 * 0.5 * 0.25
    assert torch.equal(q_proj.weight, expected)


def test_every_linear_layer_outside_experts_routers_and_head_is_adapted() -> None:
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    shared = {"mlp.shared_expert_gate", *(f"mlp.shared_expert.{name}" for name in mlp)}
    latent = {f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    expected = {
        "qwen2_moe": dict.fromkeys(range(3), attention | shared),
        "mixtral": dict.fromkeys(range(3), attention),
        "llama": dict.fromkeys(range(3), attention | {f"mlp.{name}" for name in mlp}),
        "deepseek_v2": {
            0: latent | {f"mlp.{name}" for name in mlp},  # its first layer has no experts
            **dict.fromkeys((1, 2, 3), latent | {f"mlp.shared_experts.{name}" for name in mlp}),
        },
    }
    for family, layers in expected.items():
        names = {f"model.layers.{layer}.{name}" for layer, kinds in layers.items() for name in kinds}
        view = moe_view(tiny.build_model(family))
        assert set(linear_layers(view)) == names
        scope = lora(view.model)
        assert set(scope.disk_tensors()) == {f"{name}.weight" for name in names}
        assert set(scope.named_parameters()) == {f"{name}.lora_{side}" for name in names for side in "AB"}


# Beside the usual ones, two with linear layers inside the router and one whose router is a linear layer.
@pytest.mark.parametrize("family", [*tiny.MOE_FAMILIES, "granitemoe", "hunyuan_v1_moe", "jamba"])
def test_no_router_and_no_expert_of_any_family_is_adapted(family: str) -> None:
    view = moe_view(tiny.build_model(family))
    inside = {
        id(parameter)
        for layer in view.layers
        for part in (layer.router, layer.experts)
        for parameter in part.parameters()
    }
    layers = linear_layers(view)
    assert layers
    assert not any(id(layer.weight) in inside for layer in layers.values())
    assert not any(re.search(r"embed|lm_head", name) for name in layers)


@DTYPES
def test_merging_again_adds_nothing_and_the_initial_values_give_the_base_back(dtype: torch.dtype) -> None:
    """What `measure` does; to the last bit, and a zero keeps its sign."""
    model = tiny.build_model("qwen2_moe").to(dtype)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = -0.0
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scope = lora(model)
    initial = snapshot(scope)
    train(scope)
    final = snapshot(scope)

    def merged(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assign(scope, values)
        scope.merge()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    first = merged(final)
    assert all(same_bits(tensor, base[name]) for name, tensor in merged(initial).items())
    again = merged(final)
    scope.merge()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, first[name])
        assert same_bits(tensor, again[name])
    changed = {name for name, tensor in first.items() if not same_bits(tensor, base[name])}
    assert changed == set(scope.disk_tensors())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_what_is_written_is_what_the_model_holds() -> None:
    model = tiny.build_model("deepseek_v2")
    scope = lora(model)
    train(scope)
    scope.merge()
    held = all_tensors(moe_view(model))
    assert all(torch.equal(tensor, held[name]) for name, tensor in scope.disk_tensors().items())


@FAMILIES
def test_a_model_is_its_own_outside_of_attached(family: str) -> None:
    model = tiny.build_model(family)
    modules, attributes, batch = dict(model.named_modules()), set(vars(model)), random_batch()
    names, before = list(model.state_dict()), run(model, batch)
    scope = lora(model)
    train(scope)

    def look_and_fail() -> None:
        assert not torch.equal(run(model, batch), before)
        assert model.get_decoder() is modules["model"]
        assert model.get_output_embeddings() is modules["lm_head"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), scope.attached():
        look_and_fail()
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert set(vars(model)) == attributes
    assert torch.equal(run(model, batch), before)


def test_masking_experts_and_changing_their_implementation_work_while_attached() -> None:
    model = tiny.build_model("qwen2_moe")
    view, batch = moe_view(model), random_batch()
    scope = lora(model)
    train(scope)
    with scope.attached():
        whole = run(model, batch)
        with experts_masked(view, {1: (0, 1)}):
            assert not torch.allclose(run(model, batch), whole)
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(run(model, batch), whole, rtol=1e-4, atol=1e-5)


@DTYPES
def test_gradients_reach_every_adapter_and_nothing_else(dtype: torch.dtype) -> None:
    model = tiny.build_model("qwen2_moe").to(dtype)
    scope, batch = lora(model), random_batch()
    train(scope)
    assert {leaf.dtype for leaf in scope.named_parameters().values()} == {torch.float32}
    with scope.attached():
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in scope.named_parameters().values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_values_follow_from_the_seed_alone() -> None:
    """A as nn.Linear draws it: uniform within 1 / sqrt(in); B is 0, so that the first step starts at the base."""
    first, second = (snapshot(lora(tiny.build_model("llama"), seed=3)) for _ in range(2))
    other = snapshot(lora(tiny.build_model("llama"), seed=4))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if name.endswith("lora_B"):
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound
    reference = nn.Linear(32, 64, bias=False).weight
    drawn = torch.cat([value.flatten() for name, value in first.items() if value.shape[1:] == (32,)])
    assert abs(float(drawn.std() / reference.std()) - 1) < 0.1


def test_a_bf16_base_does_not_round_the_adapters() -> None:
    wide, narrow = (
        snapshot(lora(tiny.build_model("llama").to(dtype))) for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(value, narrow[name]) for name, value in wide.items())


def test_a_weight_that_two_layers_share_is_refused_by_name() -> None:
    model = tiny.build_model("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    with pytest.raises(ModelError) as refused:
        lora(model)
    assert refused.value.code == "shared_linear"
    assert "model.layers.1.self_attn.k_proj" in refused.value.message
    assert "model.layers.1.self_attn.v_proj.weight" in refused.value.message


def test_a_weight_that_the_files_do_not_hold_is_refused_before_the_training() -> None:
    model = tiny.build_model("llama")
    missing = "model.layers.2.mlp.up_proj.weight"
    names = set(model.state_dict())
    lora(model, on_disk=names)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj") as refused:
        lora(model, on_disk=names - {missing})
    assert refused.value.code == "not_on_disk"


def test_weights_in_one_storage_are_no_shared_weights() -> None:
    """As tensors read from one mapped file are."""
    model = tiny.build_model("qwen2_moe")
    expected = set(lora(model).disk_tensors())
    storage = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = storage[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert set(lora(model).disk_tensors()) == expected


def test_tied_embeddings_are_no_business_of_an_adapter() -> None:
    model = tiny.build_model("llama", tie_word_embeddings=True)
    assert not any("embed" in name or "lm_head" in name for name in lora(model).disk_tensors())
