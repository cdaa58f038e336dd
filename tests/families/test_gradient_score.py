"""Attribution by gradient of every family against the gradients of the fused tensors themselves."""

from __future__ import annotations

import torch

from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch
from tests.scored import expert_derivatives


@EVERY_FAMILY
def test_gradient_score(family: str) -> None:
    """d(loss)/dc of an expert multiplied by c is the sum of gradient times weight over all its tensors."""
    model, given = tiny.build_model(family), batch()
    view = moe_view(model)
    found = expert_derivatives(view, [given]).mean
    model.requires_grad_(True)
    output = model(input_ids=given.input_ids, attention_mask=given.attention_mask, use_cache=False)
    logits = output.logits[:, :-1].float().log_softmax(-1)
    labels = given.labels[:, 1:]
    nll = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    (nll.sum(1) / (labels != -100).sum(1)).mean().backward()
    wanted = torch.zeros_like(found)
    for row, layer in enumerate(view.layers):
        for parameter in layer.experts.parameters():
            wanted[row] += (parameter.grad * parameter).detach().double().flatten(1).sum(1)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
