"""An edited expert and router, written and opened again with from_pretrained; the files beside them untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from seuf_core.checkpoint.delta import apply_delta
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.moe.disk import all_tensors, expert_tensors, router_tensors
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.checkpoint.edits import contents
from tests.families.common import EVERY_FAMILY, batch, logits_of

EXPERT = 2


def assert_loads_as(folder: Path, model: torch.nn.Module) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    wanted, found = model.state_dict(), loaded.state_dict()
    assert set(wanted) == set(found)
    differing = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not differing
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded.eval(), batch()), logits_of(model, batch()))  # type: ignore[arg-type]


@EVERY_FAMILY
@pytest.mark.parametrize("shards", ["40KB", "1GB"])
def test_round_trip(family: str, shards: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", family, max_shard_size=shards)
    model = tiny.build_model(family)
    view = moe_view(model)
    layer, noise = view.layers[-1], torch.Generator().manual_seed(5)
    for parameter in layer.experts.parameters():  # by hand: not through what the writer is given
        parameter.data[EXPERT] += torch.randn(parameter.shape[1:], generator=noise)
    for name, parameter in layer.router.named_parameters():
        if "e_score" not in name:
            parameter.data += torch.randn(parameter.shape, generator=noise)
    changed = expert_tensors(view, layer.index, [EXPERT]) | router_tensors(view, [layer.index])
    before = contents(base)
    manifest = write_checkpoint(base, tmp_path / "out", changed, "test")
    assert_loads_as(tmp_path / "out", model)
    assert contents(base) == before
    assert_only_these_bytes_differ(base, tmp_path / "out", set(changed))
    assert inspect_model(tmp_path / "out").moe_layers == view.layer_indices
    # The delta holds one expert and one router, also where all experts are one tensor on disk.
    routers = sum(p.numel() for name, p in layer.router.named_parameters() if "e_score" not in name)
    one = sum(parameter[0].numel() for parameter in layer.experts.parameters())
    assert manifest.parameters_changed == one + routers
    assert (tmp_path / "out" / "delta.safetensors").stat().st_size < 4 * (one + routers) + 2500
    apply_delta(base, tmp_path / "out" / "delta.safetensors", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def assert_only_these_bytes_differ(base: Path, out: Path, changed: set[str]) -> None:
    """Same shards, same headers (so same names, shapes and places); zero the changed ranges: same bytes."""
    index = read_index(base)
    assert [shard.header for shard in read_index(out).shards] == [shard.header for shard in index.shards]
    for shard in index.shards:
        old, new = bytearray((base / shard.name).read_bytes()), bytearray((out / shard.name).read_bytes())
        for name in changed:
            record = index.record(name)
            assert record is not None
            if record.shard == shard.name:
                span = slice(record.offset, record.offset + record.bytes)
                assert old[span] != new[span], name
                old[span] = new[span] = bytes(record.bytes)
        assert old == new


@EVERY_FAMILY
def test_whole_model(family: str, tmp_path: Path) -> None:
    """Every parameter moved: the names are those of the files, but for buffers, and the model comes back."""
    base = tiny.write_model(tmp_path / "base", family)
    model, noise = AutoModelForCausalLM.from_pretrained(base).eval(), torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise)
    on_disk = read_index(base).tensors
    changed = all_tensors(moe_view(model), on_disk)
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    assert set(on_disk) - set(changed) == set(revert_weight_conversion(model, buffers))
    assert set(changed) <= set(on_disk)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in changed.values()} <= memory, "a copy"
    write_checkpoint(base, tmp_path / "out", changed, "test")
    assert_loads_as(tmp_path / "out", model)
    fresh = all_tensors(moe_view(tiny.build_model(family)), on_disk)  # never loaded, so nothing to reverse
    assert set(fresh) == set(changed)
