"""Experts taken out of the routing, in every family."""

from __future__ import annotations

import torch

from seuf_core.moe.routing import can_mask, capture_routing, experts_masked
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of


@EVERY_FAMILY
@torch.no_grad()
def test_masking(family: str) -> None:
    """A masked expert has score 0, no token uses it, what it holds does not matter, and all is undone after."""
    model = tiny.build_model(family)
    view, given = moe_view(model), batch()
    layer = view.layers[-1]
    if layer.selection_bias is not None:
        layer.selection_bias[:4] += 2.0  # so that a forbidden expert would be chosen for its bias alone
    before, state = logits_of(model, given), {name: t.clone() for name, t in model.state_dict().items()}
    with capture_routing(view) as routing:
        logits_of(model, given)
        usual = routing.indices[layer.index]
    forbidden = [int(expert) for expert in usual.flatten().bincount(minlength=4).argsort(descending=True)[:2]]
    assert can_mask(view, {layer.index: tuple(forbidden)})
    with experts_masked(view, {layer.index: tuple(forbidden)}):
        with capture_routing(view) as routing:
            masked = logits_of(model, given)
        assert (routing.scores(layer.index)[:, forbidden] == 0).all()
        assert not torch.isin(routing.indices[layer.index], torch.tensor(forbidden)).any()
        held = [parameter[forbidden].clone() for parameter in layer.experts.parameters()]
        for parameter in layer.experts.parameters():
            parameter[forbidden] = 5.0
        assert torch.equal(logits_of(model, given), masked)
        for parameter, own in zip(layer.experts.parameters(), held, strict=True):
            parameter[forbidden] = own
    assert masked.isfinite().all()
    assert (masked - before).abs().max() > 1e-3
    assert torch.equal(logits_of(model, given), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
