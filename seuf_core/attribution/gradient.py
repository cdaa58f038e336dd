"""How the forget loss answers to each expert: gradient . weight, without a gradient of the expert tensors.

Multiply all of an expert's parameters by c. The derivative of the loss at c = 1 is the sum over these parameters
of dLoss/dw * w, and minus that derivative is the first-order estimate of what removing the expert (c = 0) does to
the loss (arXiv 1906.10771, there per parameter group and squared). So a few scalars an expert take the place of a
fused gradient [E, 2I, H].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seuf_core.data.batches import Batch
from seuf_core.moe.forward import answer_logits
from seuf_core.moe.view import MoELayer, MoEView

SCALED_IMPLEMENTATION: Final = "seuf_scaled"


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


def expert_derivatives(view: MoEView, batches: Iterable[Batch]) -> Derivatives:
    """Run the model forward and backward over `batches` and sum dLoss/dc of every expert.

    The model is left as it was. Memory beyond it: the activations of one batch, K * H of them for each token of
    each sparse layer more than the model's own, and 8 * L * E bytes; nothing of the size of an expert.
    """
    sums, sequences = torch.zeros(len(view.layers), view.num_experts, dtype=torch.float64), 0
    with _scaled(view) as multipliers, torch.enable_grad():
        flat = [tensor for layer in multipliers for tensor in layer]
        for batch in batches:
            gradients = iter(torch.autograd.grad(_summed_nll(view, batch), flat))
            for row, layer in enumerate(multipliers):
                for tensor in layer:
                    # A scale is 1, so its gradient is the answer; a bias is its own direction.
                    product = next(gradients).double() * tensor.detach().double()
                    sums[row] += product.view(view.num_experts, -1).sum(dim=1).cpu()
            sequences += batch.input_ids.shape[0]
    return Derivatives(sums, sequences)


def _summed_nll(view: MoEView, batch: Batch) -> torch.Tensor:
    """Sum over sequences of the mean negative log-likelihood of their label tokens: sequences weigh the same."""
    answers = answer_logits(view.model, batch)
    nll = F.cross_entropy(answers.logits.float(), answers.target, reduction="none")
    tokens = torch.bincount(answers.row, minlength=answers.num_sequences)
    return (nll / tokens[answers.row]).sum()


@contextmanager
def _scaled(view: MoEView) -> Iterator[list[list[torch.Tensor]]]:
    """Inside the block experts are multiplied by scalars that are 1; yields, a layer, all that needs a gradient."""
    model, original = view.model, view.model.config._experts_implementation
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    multipliers = [_attach(layer, original, view.num_experts) for layer in view.layers]
    model.set_experts_implementation(SCALED_IMPLEMENTATION)
    try:
        yield multipliers
    finally:
        model.set_experts_implementation(original)
        for layer in view.layers:
            del layer.experts._seuf_scales
        model.requires_grad_(False)  # the biases
        for parameter in trainable:
            parameter.requires_grad_(True)


def _attach(layer: MoELayer, original: str, num_experts: int) -> list[torch.Tensor]:
    device = layer.experts.down_proj.device
    into, out = (torch.ones(num_experts, device=device, requires_grad=True) for _ in range(2))
    layer.experts._seuf_scales = (original, into, out)
    # An expert's input scale reaches the first weight but not the bias beside it: [E, 2I], small enough by itself.
    bias = getattr(layer.experts, "gate_up_proj_bias", None)
    return [into, out] if bias is None else [into, out, bias.requires_grad_(True)]


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
