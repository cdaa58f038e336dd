"""The forward pass in parts, against the whole: every value the same to the last bit."""

from __future__ import annotations

import torch

from seuf_core.data.batches import Encoded, collate
from seuf_core.moe.forward import Forward
from seuf_core.moe.passes import embed, route, run_layer, tail
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of


@EVERY_FAMILY
@torch.no_grad()
def test_layers_one_by_one(family: str) -> None:
    view, given = moe_view(tiny.build_model(family)), batch()
    whole = logits_of(view.model, given)
    flow, routed = embed(view, given)
    assert len(routed.calls) == view.num_layers
    for index in range(view.num_layers):
        flow = run_layer(view, index, flow, routed)
    states = flow.states.flatten(0, 1)
    assert torch.equal(tail(view, states).view_as(whole), whole)
    assert torch.equal(logits_of(view.model, given), whole)


@EVERY_FAMILY
@torch.no_grad()
def test_the_route_needs_no_tokens(family: str) -> None:
    view, given = moe_view(tiny.build_model(family)), batch()
    flow, routed = embed(view, given)
    again = route(view, given.attention_mask)
    for index in range(view.num_layers):
        wanted, found = run_layer(view, index, flow, routed), run_layer(view, index, flow, again)
        assert torch.equal(wanted.states, found.states)
        flow = wanted


@EVERY_FAMILY
@torch.no_grad()
def test_answers_and_states_are_the_whole_pass_where_a_label_is_predicted(family: str) -> None:
    view, given = moe_view(tiny.build_model(family)), batch()
    rows = [
        Encoded(ids[: int(mask.sum())].tolist(), 2, truncated=False)
        for ids, mask in zip(given.input_ids, given.attention_mask, strict=True)
    ]
    at = collate(rows).predicts_label()
    flow, routed = embed(view, collate(rows))
    for index in range(view.num_layers):
        flow = run_layer(view, index, flow, routed)
        torch.testing.assert_close(Forward(view).states(rows, index)[0], flow.states[at])
    answers = Forward(view, tokens=8).answers(rows)
    torch.testing.assert_close(answers.states, flow.states[at], rtol=1e-4, atol=1e-5)
    assert answers.target.tolist() == [token for row in rows for token in row.input_ids[2:]]
