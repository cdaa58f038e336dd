"""The head on answer positions alone, and the network up to one layer, against the whole forward pass."""

from __future__ import annotations

import torch

from seuf_core.moe.forward import answer_logits, layer_states
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of


@EVERY_FAMILY
@torch.no_grad()
def test_partial_forward(family: str) -> None:
    model, given = tiny.build_model(family), batch()
    states: dict[int, torch.Tensor] = {}

    def keep(index: int) -> None:
        def hook(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            states[index] = output[0] if isinstance(output, tuple) else output

        layers[index].register_forward_hook(hook)

    layers = model.get_decoder().layers
    for index in range(len(layers)):
        keep(index)
    whole, full = logits_of(model, given), dict(states)
    narrow = answer_logits(model, given)
    row, position = torch.where(given.labels[:, 1:] != -100)
    torch.testing.assert_close(narrow.logits, whole[row, position], rtol=1e-4, atol=1e-5)
    for index in range(len(layers)):
        torch.testing.assert_close(layer_states(model, index, given), full[index])
    assert torch.equal(logits_of(model, given), whole)
