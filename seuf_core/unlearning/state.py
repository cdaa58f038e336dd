"""Training checkpoints: everything a run needs to go on bit-identically, in one safetensors file.

Weights, optimiser moments and the best values so far are tensors; step, looks and settings are JSON in the
header's metadata. The batch order is a function of (seed, step), so no random state is kept. Written to a
temporary name and renamed: a file that exists is whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seuf_core.checkpoint.staging import sync
from seuf_core.unlearning.scopes import Values


@dataclass
class TrainingState:
    """A run between two steps. `moments` holds AdamW's `exp_avg`, `exp_avg_sq` and `step` of each parameter,
    `objective` what the objective itself learns (the dual variable of PDU; of most, nothing)."""

    step: int
    values: Values
    moments: dict[str, Values]
    best_values: Values
    looks: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    objective: Values = field(default_factory=dict)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write atomically; `fingerprint` names the run the file belongs to."""
        tensors = {f"value/{name}": tensor for name, tensor in self.values.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best_values.items()}
        tensors |= {f"objective/{name}": tensor for name, tensor in self.objective.items()}
        for name, moments in self.moments.items():
            tensors |= {f"adam/{key}/{name}": tensor for key, tensor in moments.items()}
        meta = {"step": self.step, "looks": self.looks, "finished": self.finished, "fingerprint": fingerprint}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, {"state": json.dumps(meta)})
        sync(temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> TrainingState | None:
        """The state in `path`, or None when there is none or it belongs to another run."""
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["state"])
            if meta["fingerprint"] != fingerprint:
                return None
            state = cls(meta["step"], {}, {}, {}, meta["looks"], meta["finished"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, rest = key.split("/", 1)
                if kind == "adam":
                    moment, name = rest.split("/", 1)
                    state.moments.setdefault(name, {})[moment] = file.get_tensor(key)
                else:
                    kept = {"value": state.values, "best": state.best_values, "objective": state.objective}
                    kept[kind][rest] = file.get_tensor(key)
        return state


def moments_of(optimizer: torch.optim.Optimizer, leaves: dict[str, torch.nn.Parameter]) -> dict[str, Values]:
    """Copies of the optimiser's tensors by parameter name; empty before the first step."""
    return {
        name: {key: tensor.detach().clone() for key, tensor in optimizer.state[leaf].items()}
        for name, leaf in leaves.items()
        if leaf in optimizer.state
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, leaves: dict[str, torch.nn.Parameter], moments: dict[str, Values]
) -> None:
    """Put the tensors of `moments_of` back, each on its parameter's device, as fused AdamW has them."""
    for name, leaf in leaves.items():
        if name in moments:
            optimizer.state[leaf] = {
                key: tensor.to(leaf.device, copy=True) for key, tensor in moments[name].items()
            }
