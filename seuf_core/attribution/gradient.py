"""How the forget loss answers to each expert: gradient . weight, without a gradient of the expert tensors.

Multiply all of an expert's parameters by c. The derivative of the loss at c = 1 is the sum over these parameters
of dLoss/dw * w, and minus that derivative is the first-order estimate of what removing the expert (c = 0) does to
the loss (arXiv 1906.10771, there per parameter group and squared). So a few scalars an expert take the place of a
fused gradient [E, 2I, H].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seuf_core.data.batches import IGNORE_INDEX, Batch
from seuf_core.moe.forward import Answers
from seuf_core.moe.head import token_nll
from seuf_core.moe.passes import Flow, Route, run_layer
from seuf_core.moe.sweep import STATES_IN_MEMORY, Progress, embedded, no_progress
from seuf_core.moe.view import MoELayer, MoEView

SCALED_IMPLEMENTATION: Final = "seuf_scaled"

# States at every layer of the batches that go through the layers together: the more, the fewer times each is read.
BYTES_OF_A_GROUP: Final = 4 << 30


@dataclass(frozen=True)
class Derivatives:
    """Derivative of the loss by each expert's multiplier, summed.

    sums: [L, E] float64, signed: sum over sequences of d(mean negative log-likelihood of the sequence's label
        tokens)/dc; nats. sequences: how many there are.
    """

    sums: torch.Tensor
    sequences: int

    @property
    def mean(self) -> torch.Tensor:
        """Derivative of the mean over sequences, fp64 [L, E], signed."""
        return self.sums / max(1, self.sequences)

    def __add__(self, other: Derivatives) -> Derivatives:
        """Derivatives of both sets together."""
        return Derivatives(self.sums + other.sums, self.sequences + other.sequences)


def derivatives_of_sets(
    view: MoEView,
    sets: Sequence[Sequence[Batch]],
    progress: Progress = no_progress,
    scratch: Path | None = None,
) -> list[Derivatives]:
    """Sum dLoss/dc of every expert over each set: forward layer by layer, then back, each layer computed once more.

    Batches go in groups, in turn through each layer; a layer is loaded twice a group. The model is left as it was.
    Memory beside it: one layer; what flows into each layer for a group
    (BYTES_OF_A_GROUP or one batch; past STATES_IN_MEMORY in a file in `scratch`); of one batch the activations of one
    layer, where each token has K * H more of them than in the model's own pass; 8 * L * E bytes a set. Nothing has the
    size of an expert.

    Args:
        progress: hears of every layer that a batch went through, there and back; done and all to do, in sequences
            times layers.
        scratch: None = the system's temporary folder.
    """
    batches = [batch for batches in sets for batch in batches]
    of = [number for number, batches in enumerate(sets) for _ in batches]
    sums = torch.zeros(len(sets), len(view.layers), view.num_experts, dtype=torch.float64)
    done, total = 0, work_of_derivatives(view, sets)
    with _scaled(view):
        for group in _groups(view, batches):
            for number, row, found in _through(view, batches[group], scratch):
                if row is not None:
                    sums[of[group.start + number], row] += found
                done += len(batches[group.start + number].input_ids)
                progress(done, total)
    return [
        Derivatives(sums[number], sum(len(batch.input_ids) for batch in batches))
        for number, batches in enumerate(sets)
    ]


def work_of_derivatives(view: MoEView, sets: Sequence[Sequence[Batch]]) -> int:
    """How often a sequence goes through a layer in `derivatives_of_sets`."""
    sequences = sum(len(batch.input_ids) for batches in sets for batch in batches)
    return (2 * view.num_layers - min(view.layer_indices, default=view.num_layers)) * sequences


def _groups(view: MoEView, batches: Sequence[Batch]) -> Iterator[slice]:
    """Consecutive batches whose states at every layer fit into BYTES_OF_A_GROUP."""
    token = (view.num_layers + 1) * view.model.config.hidden_size * view.model.dtype.itemsize
    start, size = 0, 0
    for end, batch in enumerate(batches):
        own = batch.input_ids.numel() * token
        if end > start and size + own > BYTES_OF_A_GROUP:
            yield slice(start, end)
            start, size = end, 0
        size += own
    if batches:
        yield slice(start, len(batches))


_Step = tuple[int, int | None, torch.Tensor]


def _through(view: MoEView, batches: Sequence[Batch], scratch: Path | None) -> Iterator[_Step]:
    """A group forward and back; yields (batch, None, nothing) or (batch, row of the score, its sums [E])."""
    limit = STATES_IN_MEMORY // (view.num_layers + 1)
    states, routes = embedded(view, batches, limit=limit, folder=scratch)
    entrances, device, nothing = [states], view.model.device, torch.zeros(0)
    for index in view.weights.each(range(view.num_layers)):
        entrances.append(states.like())
        for number in range(len(batches)):
            with torch.no_grad():
                flow = run_layer(view, index, entrances[index].get(number, device), routes[number])
            entrances[index + 1].put(number, flow)
            yield number, None, nothing
    gradients = entrances.pop()
    for number, batch in enumerate(batches):
        gradients.put(number, Flow(_at_the_end(view, gradients.get(number, device).states, batch.to(device))))
    row = {index: number for number, index in enumerate(view.layer_indices)}
    for index in view.weights.each(reversed(range(min(row, default=view.num_layers), view.num_layers))):
        for number in range(len(batches)):
            flow, upstream = entrances[index].get(number, device), gradients.get(number, device).states
            gradient, sums = _back(view, index, flow, routes[number], upstream)
            gradients.put(number, Flow(gradient))
            yield number, row.get(index), sums
        entrances.pop()


def _at_the_end(view: MoEView, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Gradient [B, S, H], by what comes out of the last layer, of the loss summed over sequences.

    A sequence's loss is the mean negative log-likelihood of its label tokens, so that sequences weigh the same.
    """
    labels = batch.labels[:, 1:]
    row, position = torch.where(labels != IGNORE_INDEX)
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        answers = Answers(states[row, position], labels[row, position], row, len(labels))
        nll = token_nll(view, answers)
        tokens = torch.bincount(row, minlength=len(labels))
        (gradient,) = torch.autograd.grad((nll / tokens[row]).sum(), states)
    return gradient


def _back(
    view: MoEView, index: int, flow: Flow, routed: Route, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer computed again: gradient [B, S, H] by what flows into it, and dLoss/dc of its experts, fp64 [E]."""
    layer = next((layer for layer in view.layers if layer.index == index), None)
    multipliers = [] if layer is None else _multipliers(layer)
    with torch.enable_grad():
        states = flow.states.detach().requires_grad_()
        out = run_layer(view, index, Flow(states, flow.carried), routed).states
        gradient, *products = torch.autograd.grad(out, [states, *multipliers], upstream)
    sums = torch.zeros(view.num_experts, dtype=torch.float64)
    for tensor, product in zip(multipliers, products, strict=True):
        # A scale is 1, so its gradient is the answer; a bias is its own direction.
        product = product.double() * tensor.detach().double()
        sums += product.view(view.num_experts, -1).sum(dim=1).cpu()
    return gradient, sums


@contextmanager
def _scaled(view: MoEView) -> Iterator[None]:
    """Inside the block experts are multiplied by scalars that are 1, and nothing else wants a gradient."""
    model, original = view.model, view.model.config._experts_implementation
    # By name: a layer that is loaded anew has other parameters.
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for layer in view.layers:
        into, out = (torch.ones(view.num_experts, device=model.device, requires_grad=True) for _ in range(2))
        layer.experts._seuf_scales = (original, into, out)
        for bias in _biases(layer):
            bias.requires_grad_(True)
    model.set_experts_implementation(SCALED_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(original)
        for layer in view.layers:
            del layer.experts._seuf_scales
        model.requires_grad_(False)  # the biases
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)


def _multipliers(layer: MoELayer) -> list[torch.Tensor]:
    """All that needs a gradient in a layer that is loaded: [E] scales of its experts, in and out, and a bias."""
    _, into, out = layer.experts._seuf_scales
    return [into, out, *_biases(layer)]


def _biases(layer: MoELayer) -> list[torch.Tensor]:
    """An expert's input scale reaches the first weight but not the bias beside it: [E, 2I], small enough by itself."""
    bias = getattr(layer.experts, "gate_up_proj_bias", None)
    return [] if bias is None else [bias]


def scaled_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function for transformers: every (token, expert) pair as a token of its own, in and out times 1.

    The input's scale is the first projection's, the output's scale is the second's with its bias; layout and
    activation stay transformers' business.

    Args:
        self: the family's experts module; `_seuf_scales` = (implementation to call, into [E], out [E]).
        hidden_states: [T, H]; top_k_index: [T, K] int64; top_k_weights: [T, K].

    Returns:
        [T, H], equal to the unscaled result up to the order of summation.
    """
    original, into, out = self._seuf_scales
    T, K = top_k_index.shape
    expert = top_k_index.reshape(-1, 1)
    # fp32 scales promote, so that their gradients are summed in fp32.
    states = (hidden_states.repeat_interleave(K, dim=0) * into[expert]).to(hidden_states.dtype)
    weights = (top_k_weights.reshape(-1, 1) * out[expert]).to(top_k_weights.dtype)
    # transformers wraps the family's own loop to dispatch on the config.
    forward = ALL_EXPERTS_FUNCTIONS.get(original, type(self).forward.__wrapped__)
    output: torch.Tensor = forward(self, states, expert, weights)
    return output.view(T, K, -1).sum(dim=1)


ALL_EXPERTS_FUNCTIONS.register(SCALED_IMPLEMENTATION, scaled_experts_forward)
