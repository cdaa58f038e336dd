"""What a job trains: chosen experts, their routers, adapters, or the whole model; one table of names below."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import nn

from seuf_core.data.batches import Encoded
from seuf_core.errors import MethodError, ModelError
from seuf_core.method import Method
from seuf_core.moe.disk import all_tensors, expert_tensors, router_tensors
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import MoEView
from seuf_core.observer import Observer
from seuf_core.unlearning.lora import LoraScope
from seuf_core.unlearning.project import ProjectedRouter, Subspace, held_by_retain

Values = dict[str, torch.Tensor]


class Trainable(Protocol):
    """Parameters that an optimiser may move, and how they get into the model and onto the disk."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Leaf parameters by stable names, in a stable order."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with these parameters and gradients reach them."""
        ...

    def constrain(self) -> None:
        """After an optimiser step: bring the parameters back to where they may be. Most may be anywhere."""
        ...

    def merge(self) -> None:
        """Write the parameters into the model for good."""
        ...

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        """After `merge`: disk name -> tensor of everything that may have changed."""
        ...


class ExpertScope:
    """Scopes of chosen experts: the experts as leaves, the routers of their layers as leaves, or both.

    Memory: see TargetExperts.

    Args:
        projections: layer -> what each row of its trained router must not change in (see
            seuf_core.unlearning.project). With any, no router's bias is trained.
    """

    def __init__(
        self,
        view: MoEView,
        targets: Mapping[int, tuple[int, ...]],
        *,
        train_router: bool,
        train_experts: bool = True,
        projections: Mapping[int, Sequence[Subspace]] | None = None,
    ) -> None:
        self._view = view
        self._targets = TargetExperts(
            view,
            targets,
            train_router=train_router,
            train_experts=train_experts,
            # Every token sees a bias, retain tokens too: under `project` no change of it is allowed.
            train_router_bias=not projections,
        )
        self._projected = [
            ProjectedRouter(self._targets.routers[layer], rows) for layer, rows in (projections or {}).items()
        ]
        view.model.requires_grad_(False)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self._targets.named_parameters()

    def attached(self) -> AbstractContextManager[None]:
        return self._targets.attached()

    def constrain(self) -> None:
        """Under router `project`: take back what retain tokens would see. Else nothing."""
        for router in self._projected:
            router.constrain()

    def merge(self) -> None:
        self._targets.merge()

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        tensors = router_tensors(self._view, self._targets.routers)
        for layer in self._targets.routers:
            if layer not in self._targets.router_biases:
                tensors.pop(self._view.family.router_names(layer).get("bias", ""), None)
        for layer, experts in self._targets.experts.items():
            tensors |= expert_tensors(self._view, layer, experts)
        return tensors


class WholeModelScope:
    """Scope `full`: every parameter of the model itself, routers too, with gradients and moments for all of them.

    All are in the model's own dtype: of updates of .00133 of the weights' size bfloat16 rounds 6 in 10 away.

    `on_disk`: the tensor names of the base's files, which decide under which names a tied parameter is written.
    """

    def __init__(self, view: MoEView, on_disk: Container[str] | None = None) -> None:
        self._view, self._on_disk = view, on_disk

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._view.model.named_parameters())

    @contextmanager
    def attached(self) -> Iterator[None]:
        self._view.model.requires_grad_(True)
        try:
            yield
        finally:
            self._view.model.requires_grad_(False)

    def constrain(self) -> None:
        pass

    def merge(self) -> None:
        """Nothing to do: the optimiser moved the model's own parameters."""

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        return all_tensors(self._view, self._on_disk)


def snapshot(trainable: Trainable) -> Values:
    """A copy of every parameter's present value."""
    return {name: leaf.detach().clone() for name, leaf in trainable.named_parameters().items()}


@torch.no_grad()
def assign(trainable: Trainable, values: Values) -> None:
    """Set every parameter to the value of a snapshot."""
    for name, leaf in trainable.named_parameters().items():
        leaf.copy_(values[name])


@dataclass(frozen=True)
class Parts:
    """What a scope is made from; see `build_trainable`."""

    view: MoEView
    method: Method
    targets: Mapping[int, tuple[int, ...]]
    on_disk: Container[str] | None
    retain: Sequence[Encoded]
    observer: Observer


def _experts(parts: Parts) -> Trainable:
    return _expert_scope(parts, train_experts=True)


def _routers(parts: Parts) -> Trainable:
    return _expert_scope(parts, train_experts=False)


def _expert_scope(parts: Parts, *, train_experts: bool) -> Trainable:
    projections = _held_rows(parts) if parts.method.router == "project" else {}
    movable = [not row.everything_held for rows in projections.values() for row in rows]
    if projections and not any(movable) and not train_experts:
        raise MethodError(
            "router_held",
            f"With router project at project_energy {parts.method.project_energy:g} the retain tokens hold all "
            f"{len(movable)} router rows whole, and scope {parts.method.scope} trains nothing else.",
            "Lower project_energy, or use router train.",
            "/method/project_energy",
        )
    if not all(movable):
        message = (
            f"Retain tokens hold {movable.count(False)} of {len(movable)} router rows whole, which will not move. "
            f"Lower project_energy ({parts.method.project_energy:g}) to free them."
        )
        parts.observer.event("warning", {"code": "router_rows_held", "message": message})
    return ExpertScope(
        parts.view,
        parts.targets,
        train_router=parts.method.trains_router,
        train_experts=train_experts,
        projections=projections,
    )


def _held_rows(parts: Parts) -> dict[int, tuple[Subspace, ...]]:
    def progress(done: int, total: int) -> None:
        parts.observer.phase("attributing", done, total)

    energy = parts.method.project_energy
    return held_by_retain(parts.view, tuple(parts.targets), parts.retain, energy, progress)


def _adapters(parts: Parts) -> Trainable:
    rank, alpha, seed = parts.method.lora_rank, parts.method.lora_alpha, parts.method.seed
    return LoraScope(parts.view, rank=rank, alpha=alpha, seed=seed, on_disk=parts.on_disk)


def _everything(parts: Parts) -> Trainable:
    dtype = parts.view.model.dtype
    if dtype == torch.float16:
        raise ModelError(
            "float16_model",
            "Scope full trains a model in its own dtype, and in float16 what AdamW divides by is 0.",
            "Convert the model to bfloat16 or float32, or use scope seuf or lora.",
            "/method/scope",
        )
    if dtype == torch.bfloat16:
        message = (
            "Scope full trains this model in its own bfloat16, where a step of the weaker rates is less than the "
            "rounding of most weights. Convert the model to float32 for a fair comparison."
        )
        parts.observer.event("warning", {"code": "bfloat16_rounding", "message": message})
    return WholeModelScope(parts.view, parts.on_disk)


# Which experts the first five train is decided by seuf_core.attribution.selection.
SCOPES: Final[dict[str, Callable[[Parts], Trainable]]] = {
    "seuf": _experts,  # arXiv 2411.18797
    "random_expert": _experts,  # arXiv 2411.18797, section 5
    "top_m": _experts,  # arXiv 2411.18797, section 5
    "esft": _experts,  # arXiv 2407.01906
    "experts_only": _experts,
    "router_only": _routers,
    "lora": _adapters,  # arXiv 2106.09685
    "full": _everything,
}


def build_trainable(
    view: MoEView,
    method: Method,
    targets: Mapping[int, tuple[int, ...]],
    *,
    on_disk: Container[str] | None,
    retain: Sequence[Encoded],
    observer: Observer,
) -> Trainable:
    """What the method trains, with the values of the base. The model itself is not changed.

    Args:
        targets: decoder layer -> the chosen experts; looked at by the scopes of experts only.
        on_disk: tensor names of the base's files; None when they are not known.
        retain: the retain training part; looked at with router `project` only.
        observer: hears the progress of that, and a `warning` about rows that cannot move.

    Raises:
        MethodError: `router_held`, when nothing that would be trained can move.
        ModelError: `float16_model`, with scope full; and see LoraScope.
    """
    return SCOPES[method.scope](Parts(view, method, targets, on_disk, retain, observer))
