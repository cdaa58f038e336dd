"""Target experts as leaves: same forward, same gradients as the fused tensor, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from seuf_core.moe.disk import all_tensors, expert_tensors
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import moe_view
from seuf_core.unlearning.scopes import ExpertScope, WholeModelScope, assign, snapshot
from tests import tiny
from tests.moe.test_routing import random_batch

FAMILIES = pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    batch = random_batch()
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


@FAMILIES
@IMPLEMENTATIONS
def test_split_forward_and_gradients_equal_the_fused_model(family: str, implementation: str) -> None:
    model = tiny.build_model(family)
    model.set_experts_implementation(implementation)
    view = moe_view(model)
    first, last = view.layers[0].index, view.layers[-1].index
    targets = {first: (1,), last: (0, 2)}
    fused_loss = loss_of(model)
    fused_loss.backward()
    expected = {
        (layer, expert): (
            view.layer(layer).experts.gate_up_proj.grad[expert].clone(),
            view.layer(layer).experts.down_proj.grad[expert].clone(),
        )
        for layer, experts in targets.items()
        for expert in experts
    }
    router_grads = {layer: view.layer(layer).router.weight.grad.clone() for layer in targets}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)

    leaves = TargetExperts(view, targets, train_router=True)
    with leaves.attached():
        loss = loss_of(model)
        loss.backward()
    torch.testing.assert_close(loss, fused_loss)
    for (layer, expert), (gate_up, down) in expected.items():
        for name, grad in (("gate_up_proj", gate_up), ("down_proj", down)):
            leaf = leaves.experts[layer][expert][name]
            if leaf.grad is None:  # no token chose it: fused, that is a block of zeros
                assert not grad.any()
            else:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-6)
    assert any(grad.any() for pair in expected.values() for grad in pair)
    for layer, grad in router_grads.items():
        torch.testing.assert_close(leaves.routers[layer].grad, grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters()), "a fused tensor got a gradient"


@FAMILIES
def test_training_moves_only_the_targets(family: str) -> None:
    model = tiny.build_model(family)
    view = moe_view(model)
    layer = view.layers[1].index
    before = {name: tensor.clone() for name, tensor in all_tensors(view).items()}
    scope = ExpertScope(view, {layer: (3,)}, train_router=True)
    optimizer = torch.optim.AdamW(scope.named_parameters().values(), lr=1e-2, weight_decay=0.0)
    with scope.attached():
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(view).items())
    scope.merge()
    changed = {name for name, tensor in all_tensors(view).items() if not torch.equal(tensor, before[name])}
    assert changed == set(scope.disk_tensors())
    assert changed == {*expert_tensors(view, layer, [3]), view.family.router_names(layer)["weight"]}
    state = sum(t.numel() for moments in optimizer.state.values() for t in moments.values() if t.dim())
    sizes = sum(leaf.numel() for leaf in scope.named_parameters().values())
    assert state == 2 * sizes, "optimiser state exists for more than the targets"


def test_merged_model_equals_the_attached_one() -> None:
    model = tiny.build_model("qwen2_moe")
    view = moe_view(model)
    scope = ExpertScope(view, {1: (0, 5)}, train_router=True)
    with torch.no_grad():
        for leaf in scope.named_parameters().values():
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    with scope.attached():
        attached = loss_of(model)
    scope.merge()
    torch.testing.assert_close(loss_of(model), attached)


def test_a_bf16_model_is_trained_through_fp32_masters() -> None:
    model = tiny.build_model("qwen2_moe").bfloat16()
    scope = ExpertScope(moe_view(model), {1: (0,)}, train_router=True)
    assert {leaf.dtype for leaf in scope.named_parameters().values()} == {torch.float32}
    with scope.attached():
        loss_of(model).backward()
    assert all(leaf.grad is not None for leaf in scope.named_parameters().values())
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_a_bf16_base_survives_the_fp32_masters_bit_for_bit() -> None:
    """What `measure` does: other values merged, then those of the beginning."""
    model = tiny.build_model("qwen2_moe").bfloat16()
    view = moe_view(model)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scope = ExpertScope(view, {1: (0, 5), 2: (3,)}, train_router=True)
    initial = snapshot(scope)
    assign(scope, {name: value * 1.7 + 0.01 for name, value in initial.items()})
    scope.merge()
    assert any(not torch.equal(p, base[name]) for name, p in model.named_parameters())
    assign(scope, initial)
    scope.merge()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_a_tied_embedding_is_written_under_every_name_it_has_on_disk() -> None:
    """Transformers ties what the files hold once, and unties what they hold twice with different values."""
    view = moe_view(tiny.build_model("qwen2_moe", tie_word_embeddings=True))
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    rest = set(all_tensors(view)) - {first}
    assert second not in rest
    for names in ({first}, {second}, {first, second}):
        assert set(WholeModelScope(view, rest | names).disk_tensors()) == rest | names


@pytest.mark.parametrize("whole", [True, False])
def test_assigning_a_snapshot_restores_every_value(whole: bool) -> None:
    view = moe_view(tiny.build_model("olmoe"))
    scope = WholeModelScope(view) if whole else ExpertScope(view, {2: (7,)}, train_router=False)
    initial = snapshot(scope)
    with torch.no_grad():
        for leaf in scope.named_parameters().values():
            leaf.zero_()
    assign(scope, initial)
    assert all(torch.equal(leaf, initial[name]) for name, leaf in scope.named_parameters().items())


@FAMILIES
def test_disk_names_cover_the_files_of_a_saved_model(family: str, tmp_path: object) -> None:
    from seuf_core.checkpoint.index import read_index  # the torch-free reader of what save_pretrained wrote

    folder = tiny.write_model(tmp_path / "model", family)  # type: ignore[operator]
    names = {record.name for record in read_index(folder).tensors.values()}
    assert set(all_tensors(moe_view(tiny.build_model(family)))) == names
