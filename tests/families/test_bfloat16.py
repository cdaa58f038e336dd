"""A bfloat16 checkpoint, as models are published: trained through fp32 masters, masked, written and opened again."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.moe.disk import expert_tensors, round_to_disk, router_tensors
from seuf_core.moe.routing import experts_masked
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, logits_of, loss_of
from tests.families.test_target_training import busy_targets


@EVERY_FAMILY
def test_bfloat16(family: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", family, dtype=torch.bfloat16, max_shard_size="1GB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval().requires_grad_(False)
    view = moe_view(model)
    targets = busy_targets(view)
    leaves = TargetExperts(view, targets, train_router=True)
    assert {leaf.dtype for leaf in leaves.named_parameters().values()} == {torch.float32}
    optimiser = torch.optim.AdamW(leaves.named_parameters().values(), lr=1e-2, weight_decay=0.0)
    with leaves.attached():
        for _ in range(2):
            optimiser.zero_grad()
            loss_of(model, batch()).backward()
            optimiser.step()
    leaves.merge()
    with torch.no_grad(), experts_masked(view, {view.layer_indices[0]: (0,)}):
        assert logits_of(model, batch()).isfinite().all()
    changed = router_tensors(view, targets)
    for layer, experts in targets.items():
        changed |= expert_tensors(view, layer, experts)
    round_to_disk(changed, read_index(base))
    write_checkpoint(base, tmp_path / "out", changed, "test")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    wanted, found = model.state_dict(), again.state_dict()
    assert {name: tensor.dtype for name, tensor in wanted.items()} == {
        name: t.dtype for name, t in found.items()
    }
    differing = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not differing
