"""Routing as captured from hooks, against each family's router computed by hand, and masking of experts."""

from __future__ import annotations

import pytest
import torch

from seuf_core.data.batches import Batch
from seuf_core.errors import ModelError
from seuf_core.moe.routing import capture_routing, experts_masked
from seuf_core.moe.view import moe_view
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


def test_dense_model_is_refused() -> None:
    with pytest.raises(ModelError):
        moe_view(tiny.build_model("llama"))


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
