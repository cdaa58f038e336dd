"""A model whose layers are read when they are needed, against from_pretrained: every value to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from seuf_core.moe.passes import embed, run_layers, tail
from seuf_core.moe.skeleton import open_model
from seuf_core.moe.view import MoEView
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of


def pretrained(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        # Mapped files begin anywhere, and matmuls round by how their operands are aligned.
        parameter.data = parameter.data.clone()
    return model


def tensors(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, str, torch.dtype, bool]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (value, type(value).__name__, value.dtype, value.requires_grad) for name, value in named}


def assert_same(view: MoEView, model: PreTrainedModel) -> None:
    found, wanted = tensors(view.model), tensors(model)
    assert list(found) == list(wanted)
    for name, (value, *facts) in wanted.items():
        assert found[name][1:] == tuple(facts), name
        assert torch.equal(found[name][0], value), name
    assert set(view.model.state_dict()) == set(model.state_dict())
    assert view.model.dtype == model.dtype
    assert view.model.device == model.device
    assert view.model.training == model.training is False


def in_layers(view: MoEView) -> list[torch.Tensor]:
    """All that a layer keeps on disk."""
    return [tensor for layer in view.model.get_decoder().layers for tensor in layer.state_dict().values()]


@torch.no_grad()
def logits_layer_by_layer(view: MoEView) -> torch.Tensor:
    given = batch()
    flow, routed = embed(view, given)
    states = run_layers(view, range(view.num_layers), flow, routed).states
    return tail(view, states.flatten(0, 1)).view(*given.input_ids.shape, -1)


@EVERY_FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_is_what_from_pretrained_gives(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", family, dtype=dtype)
    view, model = open_model(folder), pretrained(folder)
    wanted = logits_of(model, batch())
    assert all(tensor.is_meta for tensor in in_layers(view))
    assert torch.equal(logits_layer_by_layer(view), wanted)
    view.weights.hold(())
    assert all(tensor.is_meta for tensor in in_layers(view))
    view.weights.hold(range(view.num_layers))
    assert_same(view, model)
    assert torch.equal(logits_of(view.model, batch()), wanted)
    view.weights.hold(())
    assert all(tensor.is_meta for tensor in in_layers(view))
