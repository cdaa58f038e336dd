"""Parts of a forward pass: embeddings, single decoder layers, and what comes after them.

Whoever freezes everything below a layer need not run it again, and whoever holds one layer at a time can still run
the whole model. The model's own forward decides how each of its layers is called (masks, rotary values, which of
them alternate): it is run once over a batch with stand-ins for the layers that write down their arguments, and the
real layers are then called with these. What comes after the layers (norm, head, scaling, caps) is the model's own
code too, over stand-ins again. So nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seuf_core.data.batches import Batch
from seuf_core.moe.view import MoEView


@dataclass(frozen=True)
class Flow:
    """What goes from one decoder layer to the next.

    states: [B, S, H]. carried: what a family hands on beside them (GLM-5: the positions that its attention chose);
    None in all others.
    """

    states: torch.Tensor
    carried: torch.Tensor | None = None


@dataclass(frozen=True)
class Route:
    """How the model calls its decoder layers for one padded batch: beside the flow, which arguments each one gets.

    Memory: masks and rotary values of the batch, shared between the layers that get the same.
    """

    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class _StandIn(nn.Module):
    """In the place of a decoder layer: writes down how it is called and lets the states pass, or others instead."""

    def __init__(self, layer: nn.Module, carries: bool, states: torch.Tensor | None = None) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: the layer must not become a child.
        self.__dict__.update(layer=layer, carries=carries, instead=states, seen=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # some families ask a layer for its kind

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["seen"] = (hidden_states, args, kwargs)
        states = hidden_states if self.__dict__["instead"] is None else self.__dict__["instead"]
        return (states, None) if self.__dict__["carries"] else states


@contextmanager
def _stand_ins(view: MoEView, states: torch.Tensor | None = None) -> Iterator[list[_StandIn]]:
    """Inside the block no decoder layer runs; `states`, if given, come out of the last one."""
    decoder, carries = view.model.get_decoder(), view.family.carries is not None
    layers = decoder.layers
    instead = [_StandIn(layer, carries) for layer in layers[:-1]]
    instead.append(_StandIn(layers[-1], carries, states))
    decoder.layers = nn.ModuleList(instead)
    try:
        yield instead
    finally:
        decoder.layers = layers


def embed(view: MoEView, batch: Batch) -> tuple[Flow, Route]:
    """What flows into the first decoder layer, and how the model would call all of them. Runs no layer.

    The graph of the embeddings is kept where gradients are on.
    """
    return _dry_run(view, input_ids=batch.input_ids, attention_mask=batch.attention_mask)


@torch.no_grad()
def route(view: MoEView, attention_mask: torch.Tensor) -> Route:
    """`embed` without embeddings: how the model calls its layers for a batch of this mask [B, S], padding right."""
    blank = torch.zeros((), dtype=view.model.dtype, device=view.model.device)
    states = blank.expand(*attention_mask.shape, view.model.config.hidden_size)
    return _dry_run(view, inputs_embeds=states, attention_mask=attention_mask)[1]


def _dry_run(view: MoEView, **inputs: torch.Tensor) -> tuple[Flow, Route]:
    with _stand_ins(view) as layers:
        view.model.get_decoder()(**inputs, use_cache=False)
    seen = [layer.__dict__["seen"] for layer in layers]
    if view.family.carries is not None:
        for _, _, kwargs in seen:
            del kwargs[view.family.carries]
    return Flow(seen[0][0]), Route(tuple((args, kwargs) for _, args, kwargs in seen))


def run_layer(view: MoEView, index: int, flow: Flow, routed: Route) -> Flow:
    """One decoder layer over a batch; it must be loaded (MoEView.weights)."""
    args, kwargs = routed.calls[index]
    if view.family.carries is not None:
        kwargs = kwargs | {view.family.carries: flow.carried}
    output = view.model.get_decoder().layers[index](flow.states, *args, **kwargs)
    return Flow(*output) if isinstance(output, tuple) else Flow(output)


class _ReachedError(Exception):
    """The pass has come as far as it should."""


@contextmanager
def ending_at(module: nn.Module, *, answered: bool = False) -> Iterator[None]:
    """The block ends where `module` is first asked or, `answered`, when its hooks have heard its answer."""

    def stop(*_: object) -> None:
        raise _ReachedError

    handle = module.register_forward_hook(stop) if answered else module.register_forward_pre_hook(stop)
    try:
        yield
    except _ReachedError:
        pass
    finally:
        handle.remove()


def tail(view: MoEView, states: torch.Tensor) -> torch.Tensor:
    """Logits [P, V] of P positions, from what comes out of the last decoder layer there: states [P, H]."""
    # Each position a sequence of its own: nothing past the layers mixes positions, and one of length 1 needs no
    # mask and no rotary value beyond the first.
    inputs = torch.zeros((), dtype=states.dtype, device=states.device).expand(len(states), 1, states.shape[1])
    with _stand_ins(view, states[:, None]):
        logits: torch.Tensor = view.model(inputs_embeds=inputs, use_cache=False).logits
    return logits[:, 0]
