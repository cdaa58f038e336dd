"""Target experts as small leaf parameters of their own.

A fused `gate_up_proj` [E, 2I, H] that requires grad would get a gradient and two Adam moments of all E experts.
Here the targets leave the fused tensors: the frozen experts are computed by transformers' own function with the
target slots weighted 0, and the targets' outputs are added from fp32 leaf parameters. Gradient and optimiser
state exist only for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seuf_core.moe.view import MoEView, expert_parameters

SPLIT_IMPLEMENTATION: Final = "seuf_split"

Leaves = dict[str, nn.Parameter]


class TargetExperts:
    """fp32 leaf parameters of the target experts and, if asked, of the routers of their layers.

    Memory of parameters, gradients and AdamW state together:
    16 bytes * (sum over targets of 3 * I * H + sum over trained routers of E * H), and the biases where a family
    has them.

    Args:
        view: the loaded model; it is not changed before `attached` or `merge`.
        targets: decoder layer index -> experts.
        train_router: whether the routers of these layers are trained too.
        train_experts: False leaves the experts as they are: the targets only say which routers are trained.
        train_router_bias: False leaves the biases of trained routers as they are.
    """

    def __init__(
        self,
        view: MoEView,
        targets: Mapping[int, tuple[int, ...]],
        *,
        train_router: bool,
        train_experts: bool = True,
        train_router_bias: bool = True,
    ) -> None:
        self.view = view
        self.targets = {layer: tuple(sorted(experts)) for layer, experts in sorted(targets.items())}
        self.experts: dict[int, dict[int, Leaves]] = {
            layer: {
                expert: {
                    name: _leaf(rows) for name, rows in expert_parameters(view.layer(layer), expert).items()
                }
                for expert in (experts if train_experts else ())
            }
            for layer, experts in self.targets.items()
        }
        trained = [view.layer(layer) for layer in self.targets] if train_router else []
        self.routers: dict[int, nn.Parameter] = {layer.index: _leaf(layer.router_weight) for layer in trained}
        self.router_biases: dict[int, nn.Parameter] = {
            layer.index: _leaf(layer.router_bias)
            for layer in trained
            if layer.router_bias is not None and train_router_bias
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every leaf by a stable name, in a stable order: `layers.3.experts.7.down_proj`, `layers.3.router`."""
        named = {
            f"layers.{layer}.experts.{expert}.{name}": leaf
            for layer, experts in self.experts.items()
            for expert, leaves in experts.items()
            for name, leaf in leaves.items()
        }
        named |= {f"layers.{layer}.router": leaf for layer, leaf in self.routers.items()}
        return named | {f"layers.{layer}.router_bias": leaf for layer, leaf in self.router_biases.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block the model computes with the leaves; outside with its own, unchanged tensors."""
        model, original = self.view.model, self.view.model.config._experts_implementation
        leaves = [(index, "weight", leaf) for index, leaf in self.routers.items()]
        leaves += [(index, "bias", leaf) for index, leaf in self.router_biases.items()]
        restore = [_attach(self.view.layer(index).projection, name, leaf) for index, name, leaf in leaves]
        for layer in self.view.layers:
            layer.experts._seuf_targets = (original, self.experts.get(layer.index, {}))
        model.set_experts_implementation(SPLIT_IMPLEMENTATION)
        try:
            yield
        finally:
            model.set_experts_implementation(original)
            for layer in self.view.layers:
                del layer.experts._seuf_targets
            for undo in restore:
                undo()

    @torch.no_grad()
    def merge(self) -> None:
        """Copy the leaves into the model's own tensors, rounded to their dtype."""
        for layer, experts in self.experts.items():
            for expert, leaves in experts.items():
                for name, rows in expert_parameters(self.view.layer(layer), expert).items():
                    rows.copy_(leaves[name])
        for layer, leaf in self.routers.items():
            self.view.layer(layer).router_weight.copy_(leaf)
        for layer, leaf in self.router_biases.items():
            self.view.layer(layer).projection.bias.copy_(leaf)


def _leaf(tensor: torch.Tensor) -> nn.Parameter:
    # fp32 masters: bf16 AdamW on bf16 weights loses small updates, and these tensors are tiny.
    return nn.Parameter(tensor.detach().to(torch.float32, copy=True))


def _attach(module: Any, name: str, leaf: nn.Parameter) -> Callable[[], None]:
    """Let `module.name` be the leaf, in the module's own dtype, until the answer is called."""
    own = module._parameters.pop(name)

    def cast(_: nn.Module, __: object) -> None:
        setattr(module, name, leaf.to(own.dtype))

    handle = module.register_forward_pre_hook(cast)
    cast(module, ())

    def undo() -> None:
        handle.remove()
        delattr(module, name)
        module._parameters[name] = own

    return undo


def split_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function for transformers: frozen experts as they are, targets from their leaves.

    Args:
        self: the family's experts module; `_seuf_targets` = (implementation of the frozen part, expert -> leaves).
        hidden_states: [T, H]; top_k_index: [T, K] int64; top_k_weights: [T, K].

    Returns:
        [T, H], equal to the unsplit result up to the order of summation.
    """
    original, targets = self._seuf_targets
    frozen = getattr(self, "_seuf_frozen", None) or partial(_frozen_forward, self, original)
    if not targets:
        return frozen(hidden_states, top_k_index, top_k_weights)
    is_target = torch.zeros_like(top_k_index, dtype=torch.bool)
    for expert in targets:
        is_target |= top_k_index == expert
    # Weight 0 rather than removed slots: every layout (bias, transposed, interleaved) stays transformers' business.
    output = frozen(hidden_states, top_k_index, top_k_weights.masked_fill(is_target, 0))
    for expert, leaves in targets.items():
        token, slot = torch.where(top_k_index == expert)
        if token.numel():
            states = _target_forward(self, leaves, hidden_states.index_select(0, token))
            weighted = states * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
    return output


def _target_forward(module: Any, leaves: Leaves, states: torch.Tensor) -> torch.Tensor:
    gate_up = _project(module, leaves, "gate_up_proj", states)
    return _project(module, leaves, "down_proj", module._apply_gate(gate_up))


def _project(module: Any, leaves: Leaves, name: str, states: torch.Tensor) -> torch.Tensor:
    weight, bias = leaves[name].to(states.dtype), leaves.get(f"{name}_bias")
    weight = weight.T if module.is_transposed else weight
    return F.linear(states, weight, None if bias is None else bias.to(states.dtype))


@contextmanager
def frozen_by(
    experts: Any, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Inside the block, where targets are attached, the frozen experts of one layer answer by `function`.

    It gets states [T, H], index [T, K] and weights [T, K], which are 0 in the slots of targets, and returns [T, H].
    """
    experts._seuf_frozen = function
    try:
        yield
    finally:
        del experts._seuf_frozen


def frozen_forward(
    model: PreTrainedModel, experts: Any, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """A layer's experts as the model itself has them, attached targets or not: arguments as in `frozen_by`."""
    targets = getattr(experts, "_seuf_targets", None)
    original = model.config._experts_implementation if targets is None else targets[0]
    return _frozen_forward(experts, original, states, index, weights)


def _frozen_forward(
    module: Any, original: str, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    # transformers wraps the family's own loop to dispatch on the config.
    eager = type(module).forward.__wrapped__
    result: torch.Tensor = ALL_EXPERTS_FUNCTIONS.get(original, eager)(module, states, index, weights)
    return result


ALL_EXPERTS_FUNCTIONS.register(SPLIT_IMPLEMENTATION, split_experts_forward)
