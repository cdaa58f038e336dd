"""A step whose examples send no token to any target expert."""

from __future__ import annotations

from pathlib import Path

import torch

from seuf_core.data.batches import Encoded
from seuf_core.method import Method
from seuf_core.moe.constants import FrozenRouter, keep_all
from seuf_core.moe.forward import Forward
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.observer import Silent
from seuf_core.unlearning.loop import Run, optimizer_of, take_step
from seuf_core.unlearning.objectives import TrainingData, build_objective
from seuf_core.unlearning.rule import Quality
from seuf_core.unlearning.scopes import ExpertScope, snapshot
from tests import tiny

METHOD = Method(objective="gradient_difference", retain_loss="none", batch_size=1, steps=2)
QUALITY = Quality(0.9, 0.8, 0.9, 0.9, 0.25)


def selected(view: MoEView, row: Encoded, layer: int) -> set[int]:
    with capture_routing(view, (layer,)) as routing, torch.no_grad():
        Forward(view).answers([row])
    return set(routing.indices[layer].flatten().tolist())


def test_its_gradient_is_zero_and_the_averages_go_on(tmp_path: Path) -> None:
    """As the masked gradient of the fused tensor would have it: AdamW with g, then with 0."""
    view = moe_view(tiny.build_model("qwen2_moe"))
    layer = view.layer_indices[-1]
    rows = [Encoded([3 + 7 * i, 4 + 5 * i, 200 - i], 2, truncated=False) for i in range(20)]
    chosen = [selected(view, row, layer) for row in rows]
    seeing, blind, expert = next(
        (i, j, expert) for i in range(20) for j in range(20) for expert in sorted(chosen[i] - chosen[j])
    )
    targets = {layer: (expert,)}
    data = TrainingData([rows[seeing], rows[blind]], [])
    constants = FrozenRouter(view, targets, Shelf())
    keep_all(view, [(constants, data.forget)])
    trainable = ExpertScope(view, targets, train_router=False)
    run = Run(
        METHOD, trainable, snapshot(trainable), build_objective(Forward(view, constants), METHOD, data, targets),
        lambda: QUALITY, QUALITY, (1, 0), tmp_path, "", 1, Silent(),
    )  # fmt: skip
    leaves = trainable.named_parameters()
    copies = {name: torch.nn.Parameter(leaf.detach().clone()) for name, leaf in leaves.items()}
    expected, optimizer = (
        torch.optim.AdamW(copies.values(), lr=1e-2, weight_decay=0.0),
        optimizer_of(run, 1e-2),
    )
    with trainable.attached():
        take_step(run, optimizer, 0)
        for name, copy in copies.items():
            copy.grad = leaves[name].grad.clone()
            assert copy.grad.any()
        expected.step()
        data.forget.reverse()  # the run sees its first example only
        take_step(run, optimizer, 1)
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    expected.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf, copies[name])
