"""What is captured of a router: its scores, computed again by hand, and the experts it chose."""

from __future__ import annotations

import pytest
import torch

from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of, scores_by_hand, watched


@EVERY_FAMILY
@torch.no_grad()
def test_router_scores(family: str) -> None:
    """s is the score before top-K; the weights the model uses are s of the chosen, times one factor a token."""
    model = tiny.build_model(family)
    view = moe_view(model)
    seen = watched(view)
    with capture_routing(view) as routing:
        logits_of(model, batch())
    assert set(routing.logits) == set(view.layer_indices)
    for layer in view.layers:
        given, scores = seen[layer.index], routing.scores(layer.index)
        assert scores.std() > 0.01  # not a test of an even router
        torch.testing.assert_close(scores, scores_by_hand(family, layer, given["states"]))
        assert torch.equal(routing.indices[layer.index], given["indices"])
        gates = routing.gates(layer.index)
        chosen = torch.zeros_like(scores).scatter(1, given["indices"], 1.0)
        assert torch.equal(routing.selected(layer.index), chosen)
        torch.testing.assert_close(gates, scores * chosen)
        if family != "phimoe":
            factor = given["weights"] / gates.gather(1, given["indices"])
            torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_phimoe_chooses_by_score_and_weighs_by_two_thresholded_softmaxes() -> None:
    """Its weights are no multiple of the scores: each is a softmax over the logits close enough to a maximum."""
    model = tiny.build_model("phimoe")
    view = moe_view(model)
    seen = watched(view)
    with capture_routing(view) as routing:
        logits_of(model, batch())
    jitter = model.config.router_jitter_noise
    for layer in view.layers:
        given = seen[layer.index]
        logits, weights = routing.logits[layer.index], given["weights"]
        assert torch.equal(given["indices"], logits.topk(2).indices)
        for token in range(len(logits)):
            rest = logits[token].clone()
            for place in (0, 1):
                best = rest.max()
                near = (best - logits[token]) / logits[token].abs().clamp(min=best) <= 2 * jitter
                softmax = rest.masked_fill(~near, -torch.inf).softmax(-1)
                torch.testing.assert_close(weights[token, place], softmax[given["indices"][token, place]])
                rest[given["indices"][token, place]] = -torch.inf


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_cohere2_says_its_score_in_its_config(score: str) -> None:
    model = tiny.build_model("cohere2_moe", expert_selection_fn=score)
    view = moe_view(model)
    with capture_routing(view) as routing, torch.no_grad():
        logits_of(model, batch())
    sums = routing.scores(view.layer_indices[0]).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) == (score == "softmax")
