"""Experts by one product each, against the family's own loop: values and gradients."""

from __future__ import annotations

import pytest
import torch

from seuf_core.moe.grouped import GROUPED_IMPLEMENTATION, use_grouped
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, loss_of


@EVERY_FAMILY
def test_it_is_the_familys_own_loop(family: str) -> None:
    model = tiny.build_model(family)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for implementation in ("eager", GROUPED_IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        loss = loss_of(model, batch())
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
        found[implementation] = (loss, *gradients)
    for value, expected in zip(found[GROUPED_IMPLEMENTATION], found["eager"], strict=True):
        size = float(expected.norm())
        assert float((value - expected).norm()) <= 3e-6 * size + 1e-7


def test_no_token_at_all() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    view.model.set_experts_implementation(GROUPED_IMPLEMENTATION)
    experts = view.layers[0].experts
    K = view.num_experts_per_tok
    none = experts(torch.empty(0, 32), torch.empty(0, K, dtype=torch.int64), torch.empty(0, K))
    assert none.shape == (0, 32)


@pytest.mark.parametrize(("dtype", "used"), [(torch.bfloat16, True), (torch.float32, False)])
def test_it_is_used_in_16_bits(dtype: torch.dtype, used: bool) -> None:
    model = tiny.build_model("qwen2_moe").to(dtype)
    use_grouped(model)
    assert (model.config._experts_implementation == GROUPED_IMPLEMENTATION) is used
