"""A pass that begins with constants, against the whole pass: answers, states and gradients, for every family."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch

from seuf_core.data.batches import Encoded
from seuf_core.moe.constants import FromStates, FrozenRouter, TrainedRouter, keep_all
from seuf_core.moe.forward import Forward
from seuf_core.moe.passes import tail
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY
from tests.families.test_target_training import busy_targets

# Attention sinks that are NaN in fp64, in the whole pass too; a router that stays in fp32.
NOT_IN_FP64 = {"granitemoe_swa", "flint"}
SPARSE_ATTENTION = {"deepseek_v32", "glm_moe_dsa"}

Make = Callable[[MoEView, dict[int, tuple[int, ...]]], FromStates | FrozenRouter | TrainedRouter]
BEGINNINGS: dict[str, tuple[bool, Make]] = {
    "states": (True, lambda view, targets: FromStates(view, min(targets), Shelf())),
    "frozen": (False, lambda view, targets: FrozenRouter(view, targets, Shelf())),
    "trained": (True, lambda view, targets: TrainedRouter(view, targets, Shelf())),
}


def sequences() -> list[Encoded]:
    """Of several lengths, so that some are padded, and with prompts."""
    generator = torch.Generator().manual_seed(1)
    lengths = ((7, 2), (5, 1), (9, 4), (7, 3), (3, 2))
    return [
        Encoded(torch.randint(3, tiny.VOCAB_SIZE, (n,), generator=generator).tolist(), first, False)
        for n, first in lengths
    ]


def gradients(
    view: MoEView,
    leaves: TargetExperts,
    forward: Forward,
    rows: list[Encoded],
    layer: int | None,
    heard: Collection[int] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one pass, over the answers or over what leaves a layer, and its gradient by every leaf."""
    with leaves.attached():
        if layer is None:
            answers = forward.answers(rows, heard)
            loss = torch.nn.functional.cross_entropy(tail(view, answers.states), answers.target)
        else:
            loss = forward.states(rows, layer, heard)[0].square().mean()
        found = torch.autograd.grad(loss, list(leaves.named_parameters().values()), materialize_grads=True)
    return loss.detach(), dict(zip(leaves.named_parameters(), found, strict=True))


@EVERY_FAMILY
@pytest.mark.parametrize("kind", list(BEGINNINGS))
def test_a_pass_from_constants(family: str, kind: str) -> None:
    """As on the first step, and after the leaves have moved so far that the router sends tokens elsewhere.

    In fp64: two orders of summation differ by 1e-6 of a gradient in fp32 already.
    """
    train_router, make = BEGINNINGS[kind]
    view, rows = moe_view(tiny.build_model(family)), sequences()
    tolerance = 5e-6
    if family not in NOT_IN_FP64:
        view.model.double().set_experts_implementation("eager")  # torch's grouped matmul knows no fp64
        tolerance = 1e-6
    view.model.requires_grad_(False)
    targets = busy_targets(view)
    constants = make(view, targets)
    # DeepSeek's sparse attention breaks ties by how far its batch is padded: its constants are made of one batch.
    keep_all(view, [(constants, rows)], tokens=2048 if family in SPARSE_ATTENTION else 20)
    begun = Forward(view, constants)
    leaves = TargetExperts(view, targets, train_router=train_router)
    for moved in (False, True, True):
        for layer in (None, min(targets), max(targets)):
            for some in (rows, [rows[4], rows[2]]):
                # Every layer as a whole, the last one too.
                loss, wanted = gradients(view, leaves, Forward(view), some, layer, range(view.num_layers))
                ours, found = gradients(view, leaves, begun, some, layer)
                torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
                # Of a leaf by its norm: single numbers near 0 are rounding of much larger ones.
                for name, value in found.items():
                    off = float(torch.linalg.vector_norm(value - wanted[name]))
                    size = float(torch.linalg.vector_norm(wanted[name]))
                    assert off <= tolerance * size + 1e-9, (name, off, size)
        with torch.no_grad():
            for leaf in leaves.named_parameters().values():
                leaf.add_(torch.randn_like(leaf) * (0.5 if moved else 0.1) * leaf.std())
