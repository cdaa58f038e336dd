"""Routing as captured from hooks, against each family's router computed by hand, and masking of experts."""

from __future__ import annotations

import pytest
import torch

from seuf_core.data.batches import Batch
from seuf_core.errors import MethodError, ModelError
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.routing import can_mask, capture_routing, experts_masked
from seuf_core.moe.view import moe_view, require_experts
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.MOE_FAMILIES)


def random_batch(rows: int = 3, length: int = 7, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return Batch(ids, mask, labels)


def run(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@FAMILIES
def test_view_finds_every_sparse_layer(family: str) -> None:
    view = moe_view(tiny.build_model(family))
    assert view.layer_indices == ((1, 2, 3) if family == "deepseek_v2" else (0, 1, 2))
    assert view.num_experts == (4 if family == "mixtral" else 8)
    assert view.num_experts_per_tok == 2


@pytest.mark.parametrize("family", tiny.DENSE)
def test_a_dense_model_is_a_view_without_layers(family: str) -> None:
    view = moe_view(tiny.build_model(family))
    assert (view.layers, view.num_experts, view.num_experts_per_tok) == ((), 0, 0)
    assert view.family.model_type == family
    with pytest.raises(ModelError, match="lora or full") as caught:
        require_experts(view)
    assert caught.value.code == "dense_model"
    on_disk = set(view.model.state_dict())
    assert set(all_tensors(view, on_disk)) == on_disk


def test_experts_of_an_unknown_family_are_not_taken_for_dense() -> None:
    model = tiny.build_model("olmoe")
    model.config.model_type = "brand_new_moe"
    with pytest.raises(ModelError) as caught:
        moe_view(model)
    assert caught.value.code == "unknown_architecture"


def test_a_dense_layer_is_no_target() -> None:
    view = moe_view(tiny.build_model("deepseek_v2"))
    with pytest.raises(ModelError) as caught:
        view.layer(0)
    assert caught.value.code == "not_a_moe_layer"


@FAMILIES
def test_scores_and_choices_equal_the_router_by_hand(family: str) -> None:
    model = tiny.build_model(family)
    view, batch, seen = moe_view(model), random_batch(), {}
    for layer in view.layers:
        layer.router.register_forward_pre_hook(
            lambda _, inputs, index=layer.index: seen.__setitem__(index, inputs[0].reshape(-1, 32).clone())
        )
    with capture_routing(view) as routing:
        run(model, batch)
    for layer in view.layers:
        scores = torch.softmax(seen[layer.index] @ layer.router.weight.T, dim=-1)
        torch.testing.assert_close(routing.scores(layer.index), scores)
        assert torch.equal(routing.indices[layer.index].sort().values, scores.topk(2).indices.sort().values)
        gates = routing.gates(layer.index)
        assert torch.equal(gates > 0, routing.selected(layer.index) > 0)
        torch.testing.assert_close(gates.sum(-1), scores.topk(2).values.sum(-1))


@FAMILIES
def test_masked_experts_are_never_chosen_and_the_model_is_restored(family: str) -> None:
    model = tiny.build_model(family)
    view, batch = moe_view(model), random_batch()
    before = run(model, batch)
    layer = view.layers[1].index
    with capture_routing(view) as routing:
        run(model, batch)
        usual = routing.indices[layer]
    forbidden = (int(usual[0, 0]), int(usual[1, 1]))
    with experts_masked(view, {layer: forbidden}), capture_routing(view) as routing:
        masked = run(model, batch)
        chosen, scores = routing.indices[layer], routing.scores(layer)
    assert not torch.isin(chosen, torch.tensor(forbidden)).any()
    assert (scores[:, list(forbidden)] == 0).all()
    assert not torch.equal(masked, before)
    assert torch.equal(run(model, batch), before)


GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


def test_grouped_routing_masks_by_weight_where_a_group_has_too_few_left() -> None:
    """DeepSeek-V2, 4 groups of 2 experts, top 4 of the best 2 groups: a forbidden place is filled with gate 0."""
    model = tiny.build_model("deepseek_v2", **GROUPS)
    view, batch = moe_view(model), random_batch()
    before = run(model, batch)
    layer = view.layers[0].index
    with experts_masked(view, {layer: (0, 5)}):
        with capture_routing(view) as routing:
            masked = run(model, batch)
        gates = routing.gates(layer)
        assert (gates[:, [0, 5]] == 0).all()
        with torch.no_grad():  # what the masked experts hold does not matter
            view.layer(layer).experts.down_proj[[0, 5]] *= -7
        assert torch.equal(run(model, batch), masked)
        with torch.no_grad():
            view.layer(layer).experts.down_proj[[0, 5]] /= -7
    torch.testing.assert_close(run(model, batch), before)
    assert not torch.equal(masked, before)


def test_a_layer_must_keep_enough_experts() -> None:
    """With 2 of 8 left top-2 still holds; with fewer the penalty would cancel and the mask do nothing."""
    model = tiny.build_model("olmoe")
    view, batch = moe_view(model), random_batch()
    with experts_masked(view, {1: tuple(range(6))}), capture_routing(view) as routing:
        run(model, batch)
        assert set(routing.indices[1].flatten().tolist()) == {6, 7}
    assert can_mask(view, {1: tuple(range(6))})
    assert not can_mask(view, {0: (1,), 1: tuple(range(7))})
    with pytest.raises(MethodError) as caught, experts_masked(view, {1: tuple(range(7))}):
        pass
    assert caught.value.code == "too_many_masked"


def test_masking_a_bf16_model_restores_it_bit_for_bit() -> None:
    model = tiny.build_model("qwen2_moe").bfloat16()
    view, batch = moe_view(model), random_batch()
    before = run(model, batch)
    with experts_masked(view, {1: (0, 3)}), capture_routing(view) as routing:
        run(model, batch)
        assert not torch.isin(routing.indices[1], torch.tensor([0, 3])).any()
    assert torch.equal(run(model, batch), before)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_masking_an_expert_nobody_chose_changes_nothing(family: str) -> None:
    """Where gates are renormalised over the chosen; elsewhere the others' softmax takes up the masked mass."""
    model = tiny.build_model(family)
    view = moe_view(model)
    one = random_batch()
    batch = Batch(one.input_ids[:1, :1], one.attention_mask[:1, :1], one.labels[:1, :1])
    layer = view.layers[0].index
    with capture_routing(view) as routing:
        before = run(model, batch)
        unused = sorted(set(range(view.num_experts)) - set(routing.indices[layer].flatten().tolist()))
    assert unused, "choose another batch: here every expert was chosen"
    with experts_masked(view, {layer: (unused[0],)}):
        torch.testing.assert_close(run(model, batch), before, atol=2e-5, rtol=1e-4)
