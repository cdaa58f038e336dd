"""What a job trains: the selected experts (and routers), or the whole model as the baseline it is compared with."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from seuf_core.moe.disk import all_tensors, expert_tensors, router_tensors
from seuf_core.moe.targets import TargetExperts
from seuf_core.moe.view import MoEView

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
    """Scopes `seuf` and `random_expert`: target experts as leaves, optionally their routers."""

    def __init__(self, view: MoEView, targets: dict[int, tuple[int, ...]], *, train_router: bool) -> None:
        self._view, self._targets = view, TargetExperts(view, targets, train_router=train_router)
        view.model.requires_grad_(False)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self._targets.named_parameters()

    def attached(self) -> AbstractContextManager[None]:
        return self._targets.attached()

    def constrain(self) -> None:
        pass

    def merge(self) -> None:
        self._targets.merge()

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        tensors = router_tensors(self._view, self._targets.routers)
        for layer, experts in self._targets.targets.items():
            tensors |= expert_tensors(self._view, layer, experts)
        return tensors


class WholeModelScope:
    """Scope `full`: every parameter of the model itself, with gradients and moments for all of them.

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
