"""GRIP's projection, by hand, against a pinv of the inputs themselves, and held through real training."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from seuf_core.data.batches import Batch, Encoded, collate, length_bucketed
from seuf_core.moe.sweep import Progress, no_progress
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning.project import ProjectedRouter, held_by_retain, retain_grams, subspace
from seuf_core.unlearning.scopes import ExpertScope
from tests import tiny
from tests.unlearning.test_objectives import rows

# Beside the usual ones: a bias on the logits, a linear layer inside the router, and one that is the router.
FAMILIES = pytest.mark.parametrize("family", [*tiny.MOE_FAMILIES, "gpt_oss", "hunyuan_v1_moe", "jamba"])
RETAIN = rows((6, 13, 3, 8), 2)  # no two of one length, so every batch has padding


def gram(inputs: list[list[float]]) -> torch.Tensor:
    x = torch.tensor(inputs, dtype=torch.float64)
    return x.T @ x


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_by_expert(view: MoEView, layer: int, retain: Sequence[Encoded]) -> list[torch.Tensor]:
    """X_e of every expert: each sequence alone and unpadded through the whole model."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(_: nn.Module, given: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        found.append((given[0].reshape(-1, given[0].shape[-1]), output[2]))

    handle = view.layer(layer).router.register_forward_hook(record)
    with torch.no_grad():
        for row in retain:
            view.model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
    handle.remove()
    states, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [states[(chosen == expert).any(dim=1)] for expert in range(view.num_experts)]


def grams_of(
    view: MoEView, layer: int, batches: list[Batch], progress: Progress = no_progress
) -> torch.Tensor:
    ((found, grams),) = retain_grams(view, [layer], batches, progress)
    assert found == layer
    return grams


def test_a_projection_worked_by_hand() -> None:
    """X = [[1, 1], [2, 2]]: pinv(X) X = [[.5, .5], [.5, .5]], so P (3, 1) = (1, -1)."""
    held = subspace(gram([[1, 1], [2, 2]]), 1.0)
    torch.testing.assert_close(held.free_part(torch.tensor([3.0, 1.0])), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("energy", "left"),
    [
        (0.5, [0.0, 5.0, 7.0]),
        (0.75, [0.0, 5.0, 7.0]),  # the first direction has 9 of 12: just enough
        (0.76, [0.0, 0.0, 7.0]),
        (0.99, [0.0, 0.0, 7.0]),  # the zero direction is never needed
        (1.0, [0.0, 0.0, 7.0]),
    ],
)
def test_energy_is_the_share_of_squared_singular_values(energy: float, left: list[float]) -> None:
    """X = diag(3, sqrt 3) beside a direction that no input has."""
    held = subspace(gram([[3, 0, 0], [0, 3**0.5, 0]]), energy)
    torch.testing.assert_close(held.free_part(torch.tensor([2.0, 5.0, 7.0])), torch.tensor(left))


def test_an_expert_that_no_token_selects_is_free_to_the_last_bit() -> None:
    held = subspace(torch.zeros(5, 5, dtype=torch.float64), 1.0)
    assert held.nothing_held
    assert not held.everything_held
    change = noise(5)
    assert torch.equal(held.free_part(change), change)


def test_inputs_of_full_rank_hold_the_row_to_the_last_bit() -> None:
    x = noise(40, 6).double()
    held = subspace(x.T @ x, 1.0)
    assert held.everything_held
    assert not held.nothing_held
    assert torch.equal(held.free_part(noise(6)), torch.zeros(6))


@pytest.mark.parametrize("rank", [1, 3, 7, 11, 12])
@pytest.mark.parametrize("tokens", [12, 60])
def test_all_energy_is_the_null_space_of_grip(tokens: int, rank: int) -> None:
    """P = I - pinv(X) X, with more rows than columns too, and whichever of the two bases is kept."""
    x = (noise(tokens, rank, seed=1) @ noise(rank, 12, seed=2)).double()
    held = subspace(x.T @ x, 1.0)
    assert held.basis.shape[0] == min(rank, 12 - rank)
    oracle = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(x, rtol=1e-6) @ x
    for seed in range(3):
        change = noise(12, seed=seed)
        torch.testing.assert_close(
            held.free_part(change).double(), oracle @ change.double(), rtol=1e-5, atol=1e-6
        )


def test_no_smaller_set_of_directions_has_the_energy() -> None:
    x = noise(30, 10).double() * torch.linspace(3, 0.1, 10, dtype=torch.float64)
    squares = torch.linalg.svdvals(x) ** 2
    for energy in (0.3, 0.6, 0.9, 0.99):
        held = subspace(x.T @ x, energy)
        rank = held.basis.shape[0] if held.spans == "held" else 10 - held.basis.shape[0]
        assert squares[:rank].sum() >= energy * squares.sum() > squares[: rank - 1].sum()


@FAMILIES
def test_the_inputs_are_those_of_real_tokens_that_select_the_expert(family: str) -> None:
    view = moe_view(tiny.build_model(family))
    layer = view.layer_indices[1]
    seen: list[tuple[int, int]] = []
    batches = list(length_bucketed(RETAIN, 32, pad_token_id=5))
    grams = grams_of(view, layer, batches, lambda *progress: seen.append(progress))
    expected = [x.double().T @ x.double() for x in inputs_by_expert(view, layer, RETAIN)]
    torch.testing.assert_close(grams, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert seen[-1] == (len(RETAIN) * (layer + 1), len(RETAIN) * (layer + 1))
    assert len(seen) > 1


@pytest.mark.parametrize("padding", [0, 7, 200])
def test_padding_is_no_input(padding: int) -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    alone = sum(grams_of(view, 1, [collate([row])]) for row in RETAIN)
    torch.testing.assert_close(grams_of(view, 1, [collate(RETAIN, padding)]), alone, rtol=1e-4, atol=1e-4)


def test_the_hooks_are_gone_afterwards() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    grams_of(view, 1, [collate(RETAIN)])
    router = view.layer(1).router
    assert not router._forward_hooks
    assert not router._forward_pre_hooks


def test_every_layer_has_its_own_subspaces_and_says_how_far_it_is() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    heard: list[tuple[int, int]] = []
    found = held_by_retain(view, (0, 2), RETAIN, 1.0, lambda *progress: heard.append(progress))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (3 * len(RETAIN), 3 * len(RETAIN))  # layers 0 to 2, in one pass
    for layer, held in found.items():
        for x, row in zip(inputs_by_expert(view, layer, RETAIN), held, strict=True):
            assert (x @ row.free_part(noise(32))).abs().max() < 1e-5 if len(x) else row.nothing_held


def projected(view: MoEView, layer: int, energy: float = 1.0) -> ExpertScope:
    held = held_by_retain(view, (layer,), RETAIN, energy, lambda done, total: None)
    return ExpertScope(view, {layer: (0,)}, train_router=True, train_experts=False, projections=held)


@FAMILIES
def test_no_training_changes_the_logit_of_an_expert_at_the_retain_tokens_that_selected_it(
    family: str,
) -> None:
    """AdamW on a loss that pulls at every logit, far from the base: seen by other tokens, and not by these."""
    view = moe_view(tiny.build_model(family))
    layer = view.layer_indices[0]
    inputs = inputs_by_expert(view, layer, RETAIN)
    scope = projected(view, layer)
    router = scope.named_parameters()[f"layers.{layer}.router"]
    base = router.detach().clone()
    optimizer = torch.optim.AdamW(scope.named_parameters().values(), lr=0.1, weight_decay=0.0)
    other = noise(50, 32, seed=4)
    for _ in range(5):
        optimizer.zero_grad()
        (other @ router.T).sigmoid().sum().backward()
        optimizer.step()
        scope.constrain()
    change = router.detach() - base
    assert (other @ change.T).abs().amax(dim=0).min() > 0.1, "a row has not moved at all"
    for expert, x in enumerate(inputs):
        if len(x):
            assert (x @ change[expert]).abs().max() < 2e-5 * x.norm(dim=1).max()


def test_a_bias_stays_for_every_token_sees_it() -> None:
    view = moe_view(tiny.build_model("gpt_oss"))
    bias = view.layer(0).router_bias
    assert bias is not None
    before = bias.detach().clone()
    scope = projected(view, 0)
    assert list(scope.named_parameters()) == ["layers.0.router"]
    assert list(scope.disk_tensors()) == ["model.layers.0.mlp.router.weight"]
    with torch.no_grad():
        scope.named_parameters()["layers.0.router"].add_(noise(8, 32))
    scope.merge()
    assert torch.equal(bias, before)
    trained = ExpertScope(view, {0: (0,)}, train_router=True, train_experts=False)
    assert list(trained.named_parameters()) == ["layers.0.router", "layers.0.router_bias"]
    assert set(trained.disk_tensors()) == {f"model.layers.0.mlp.router.{kind}" for kind in ("weight", "bias")}


def test_the_optimiser_alone_would_leave_the_subspace() -> None:
    """Why `constrain` projects too: the gradient is in the null space, AdamW's step is not."""
    view = moe_view(tiny.build_model("qwen2_moe"))
    (x, *_) = inputs_by_expert(view, 0, RETAIN)
    scope = projected(view, 0)
    router = scope.named_parameters()["layers.0.router"]
    base = router.detach().clone()
    optimizer = torch.optim.AdamW([router], lr=0.1, weight_decay=0.0)
    (noise(50, 32) @ router.T).sigmoid().sum().backward()
    assert (x @ router.grad[0]).abs().max() < 1e-4
    assert router.grad[0].norm() > 0.1
    optimizer.step()
    assert (x @ (router.detach() - base)[0]).abs().max() > 0.1
    scope.constrain()
    assert (x @ (router.detach() - base)[0]).abs().max() < 1e-4


def test_constrain_keeps_the_free_part_and_moves_nothing_that_is_allowed() -> None:
    leaf = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    line = subspace(gram([[1, 1]]), 1.0)
    free = subspace(torch.zeros(2, 2, dtype=torch.float64), 1.0)
    whole = subspace(gram([[1, 0], [0, 1]]), 1.0)
    router = ProjectedRouter(leaf, [line, free, whole])
    with torch.no_grad():
        leaf += torch.tensor([[0.5, 0.25], [0.0, 0.0], [0.5, 0.25]])
        leaf[1] = torch.tensor([1e-8, 0.7])  # 3 + (1e-8 - 3) would be 0
    moved = leaf[1].clone()
    router.constrain()
    torch.testing.assert_close(leaf[0].detach(), torch.tensor([1.125, 1.875]))
    assert torch.equal(leaf[1], moved)
    assert leaf[2].tolist() == [5.0, 6.0]
    settled = leaf.detach().clone()
    router.constrain()
    torch.testing.assert_close(leaf.detach(), settled, rtol=0, atol=3e-7)
    (leaf * torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]])).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([[1.0, -1.0], [3.0, 1.0], [0.0, 0.0]]))


def test_less_energy_lets_retain_tokens_see_no_more_than_the_rest() -> None:
    """Of each expert's inputs, squared, at most the share that is not held is left; of all of them, some of it is."""
    view = moe_view(tiny.build_model("qwen2_moe"))
    held = held_by_retain(view, (0,), RETAIN, 0.9, lambda done, total: None)[0]
    seen = energy = 0.0
    for x, row in zip(inputs_by_expert(view, 0, RETAIN), held, strict=True):
        projection = torch.stack([row.free_part(unit) for unit in torch.eye(32)])
        left, whole = float((x @ projection).square().sum()), float(x.square().sum())
        assert left <= 0.1001 * whole
        seen, energy = seen + left, energy + whole
    assert seen > 0.02 * energy
