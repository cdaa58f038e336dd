"""Training the targets as leaves against training the fused tensors with masked gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from seuf_core.moe.routing import capture_routing
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of, loss_of

STEPS = 4


def busy_targets(view: MoEView) -> dict[int, tuple[int, ...]]:
    """The two busiest experts of the first sparse layer and the busiest of the last."""
    with capture_routing(view) as routing, torch.no_grad():
        logits_of(view.model, batch())
    first, last = view.layer_indices[0], view.layer_indices[-1]
    by_use = {at: routing.selected(at).sum(0).argsort(descending=True).tolist() for at in (first, last)}
    return {first: tuple(by_use[first][:2]), last: (by_use[last][0],)}


def optimiser(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    # eps: where gates are renormalised, the logits of experts that were not chosen have gradient 0 but for
    # rounding (1e-9); Adam would blow that up to steps of the full rate, in directions of chance.
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, eps=1e-5)


def train_masked(model: PreTrainedModel, targets: dict[int, tuple[int, ...]], *, train_router: bool) -> None:
    """The whole fused tensors, every gradient but the targets' set to 0."""
    view = moe_view(model)
    model.requires_grad_(False)
    trained: list[torch.nn.Parameter] = []
    for index, experts in targets.items():
        layer = view.layer(index)
        for parameter in layer.experts.parameters():
            keep = torch.zeros(len(parameter), *[1] * (parameter.dim() - 1))
            keep[list(experts)] = 1
            parameter.requires_grad_(True)
            parameter.register_hook(lambda grad, keep=keep: grad * keep)
            trained.append(parameter)
        if train_router:
            named = layer.router.named_parameters()
            router = [parameter for name, parameter in named if "e_score" not in name]
            trained += [parameter.requires_grad_(True) for parameter in router]
    step = optimiser(trained)
    for _ in range(STEPS):
        step.zero_grad()
        loss_of(model, batch()).backward()
        step.step()


@EVERY_FAMILY
@pytest.mark.parametrize("train_router", [True, False], ids=["router", "frozen"])
def test_target_training(family: str, train_router: bool) -> None:
    """fp32, AdamW, several steps: every parameter of the two models agrees to 1e-5."""
    masked, model = tiny.build_model(family), tiny.build_model(family)
    view = moe_view(model)
    targets = busy_targets(view)
    train_masked(masked, targets, train_router=train_router)
    model.requires_grad_(False)
    leaves = TargetExperts(view, targets, train_router=train_router)
    step = optimiser(list(leaves.named_parameters().values()))
    with leaves.attached():
        for _ in range(STEPS):
            step.zero_grad()
            loss_of(model, batch()).backward()
            step.step()
    before = tiny.build_model(family).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    leaves.merge()
    wanted, found = masked.state_dict(), model.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = {name for name, tensor in found.items() if (tensor - before[name]).abs().max() > 1e-4}
    assert len(moved) == len(leaves.named_parameters()) - extra_leaves(leaves), moved


def extra_leaves(leaves: TargetExperts) -> int:
    """Leaves beyond one a tensor: a second expert of a layer shares the fused tensor of the first."""
    return sum((len(experts) - 1) * len(next(iter(experts.values()))) for experts in leaves.experts.values())
