"""Every scope and router mode on every family: what moved is what the scope says it writes, under disk names."""

from __future__ import annotations

from pathlib import Path

import torch

from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.writer import plan
from seuf_core.data.batches import Encoded
from seuf_core.method import EXPERT_SCOPES, Method
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.view import moe_view
from seuf_core.observer import Silent
from seuf_core.unlearning.scopes import build_trainable
from tests import tiny
from tests.families.common import EVERY_FAMILY, batch, loss_of
from tests.families.test_target_training import busy_targets

MODES = [
    ("seuf", "train"),
    ("seuf", "project"),
    ("router_only", "train"),
    ("experts_only", "freeze"),
    ("lora", "freeze"),
    ("full", "freeze"),
]
RETAIN = [Encoded(list(range(5 + n, 9 + n)), 1, False) for n in range(2)]


@EVERY_FAMILY
def test_scopes(family: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", family, max_shard_size="1GB")
    on_disk = read_index(base).tensors
    for scope, router in MODES:
        model = tiny.build_model(family)
        view = moe_view(model)
        targets = busy_targets(view) if scope in EXPERT_SCOPES else {}
        method = Method.model_validate({"scope": scope, "router": router, "project_energy": 0.5})
        trainable = build_trainable(view, method, targets, on_disk=on_disk, retain=RETAIN, observer=Silent())
        before = {name: tensor.clone() for name, tensor in all_tensors(view, on_disk).items()}
        optimiser = torch.optim.SGD(trainable.named_parameters().values(), lr=0.1)
        with trainable.attached():
            for _ in range(2):
                optimiser.zero_grad()
                loss_of(model, batch()).backward()
                optimiser.step()
                trainable.constrain()
        trainable.merge()
        after = all_tensors(view, on_disk)
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        written = trainable.disk_tensors()
        whole = {name.partition("[")[0] for name in written}
        assert moved, (scope, router)
        assert moved <= whole, (scope, router)
        if scope in EXPERT_SCOPES:
            routers = {
                name
                for at in targets
                for kind, name in view.family.router_names(at).items()
                if kind == "weight" or router != "project"  # every token sees a bias: it stays
            }
            assert (routers <= whole) == (router != "freeze")
            assert routers.isdisjoint(whole) == (router == "freeze")
        plan(base, written)  # every name is in the files, with this shape
