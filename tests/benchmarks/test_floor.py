"""The floor counts the products it makes, and no more than a step needs of the last layer."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import Products
from benchmarks.shapes import tiny_fields, write_shape
from benchmarks.steps import whole
from seuf_core.moe.view import MoEView

TOKENS, LABELS = 64, 32
HIDDEN, INSIDE, VOCABULARY, EXPERTS, CHOSEN = 64, 32, 512, 8, 2  # benchmarks.shapes.TINY


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> MoEView:
    name = "olmoe-125m"
    return whole(write_shape(name, tmp_path_factory.mktemp("shape"), **tiny_fields(name)))


def by_hand(full_layers: int, last: bool) -> int:
    """Weights times positions, two operations each, forward and backward."""
    attention, router, expert = 4 * HIDDEN**2, EXPERTS * HIDDEN, 3 * HIDDEN * INSIDE
    inner = router + CHOSEN * expert
    return 4 * (
        full_layers * TOKENS * (attention + inner)
        + last * (TOKENS * attention + LABELS * inner)
        + LABELS * HIDDEN * VOCABULARY
    )


@pytest.mark.parametrize(
    ("layers", "full", "last"), [((1, 2, 3), 2, True), ((1, 2), 2, False), ((3,), 0, True), ((), 0, False)]
)
def test_its_operations_are_those_of_the_suffix(
    view: MoEView, layers: tuple[int, ...], full: int, last: bool
) -> None:
    products = Products(view, layers, TOKENS, LABELS)
    assert products.flops == by_hand(full, last)
    with FlopCounterMode(display=False) as counted:
        products()
    assert counted.get_total_flops() == products.flops
