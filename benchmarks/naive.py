"""Unlearning the ordinary way: the whole model and a frozen copy in memory, whole passes, masked fused gradients.

What open-unlearning (https://github.com/locuslab/open-unlearning) and the WMDP code
(https://github.com/centerforaisafety/wmdp, rmu/unlearn.py) do when they are asked to train one expert, with the same
losses as ours (seuf_core.unlearning.losses), so that the two ways differ in speed and memory only:

 N1, careful: every parameter frozen but the fused experts (and the router) of the target layers; a mask on the
     gradient keeps the target experts only; grouped matrix products, fused AdamW.
 N0, as these codes do it: every parameter requires a gradient and is in the optimiser; nothing is masked, so it
     trains the whole model. Its time and memory are those of a step that then keeps one expert of it.

In both, forget and retain examples go through the whole model one after the other and the reference is a second
model that runs in every step. N1 computes logits only where they are used: not in RMU's passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from seuf_core.data.batches import Batch, Encoded, collate
from seuf_core.method import Method
from seuf_core.moe.routing import Routing, capture_routing
from seuf_core.moe.view import MoEView
from seuf_core.unlearning import losses
from seuf_core.unlearning.terms import Terms, TrainingData

Targets = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Passed:
    """What one whole pass gave: logits where a label is predicted [P, V] (of N1's RMU none), their tokens and
    sequences, and the output of the steered layer [B, S, H] with the mask of those positions."""

    logits: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    states: torch.Tensor
    mask: torch.Tensor
    size: int

    @property
    def nll(self) -> torch.Tensor:
        """l of each sequence, [B]."""
        tokens = F.cross_entropy(self.logits.float(), self.target, reduction="none")
        return tokens.new_zeros(self.size).index_add(0, self.row, tokens)

    @property
    def tokens(self) -> torch.Tensor:
        """Label tokens of each sequence, [B]."""
        return torch.bincount(self.row, minlength=self.size)


class Naive:
    """One job's training, the ordinary way.

    Args:
        view: the model that is trained, in place.
        reference: the model before training; `view.model` itself where memory has no room for a second one: a pass
            takes as long, and only the first step's loss is then right.
        method: objective rmu, npo or gradient_difference; hidden_mse or cross_entropy; rmu_coefficient a number.
        targets: decoder layer -> target experts; RMU steers the highest of these layers.
        everything: N0 instead of N1.
    """

    def __init__(
        self,
        view: MoEView,
        reference: PreTrainedModel,
        method: Method,
        data: TrainingData,
        targets: Targets,
        learning_rate: float,
        *,
        everything: bool = False,
    ) -> None:
        self._view, self._reference, self._method, self._data = view, reference, method, data
        self._targets, self._everything = targets, everything
        self._layer = max(targets)
        self._anchored = targets if method.trains_router else {}
        reference.set_experts_implementation("grouped_mm")
        view.model.requires_grad_(False)
        self._trained = list(view.model.parameters()) if everything else list(self._thawed())
        self._optimizer = torch.optim.AdamW(self._trained, lr=learning_rate, weight_decay=0.0, fused=True)
        hidden_size, coefficient = view.model.config.hidden_size, method.rmu_coefficient
        length = 0.0 if coefficient == "auto" else coefficient
        self._goal = length * losses.control_vector(hidden_size, method.seed).to(view.model.device)

    def _thawed(self) -> Iterable[nn.Parameter]:
        """Fused parameters of the target layers' experts, and their routers where these are trained."""
        for index in self._targets:
            layer = self._view.layer(index)
            yield from layer.experts.parameters(recurse=False)
            if self._method.trains_router:
                yield from layer.projection.parameters(recurse=False)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block the parameters want gradients; outside the model is frozen and has none."""
        self._view.model.set_experts_implementation("grouped_mm")
        for parameter in self._trained:
            parameter.requires_grad_(True)
        masks = [] if self._everything else list(self._masked())
        try:
            yield
        finally:
            for handle in masks:
                handle.remove()
            self._optimizer.zero_grad(set_to_none=True)
            self._view.model.requires_grad_(False)

    def _masked(self) -> Iterable[torch.utils.hooks.RemovableHandle]:
        """Zeros in the gradient of every expert that is no target."""
        for index, experts in self._targets.items():
            others = [e for e in range(self._view.num_experts) if e not in experts]
            for parameter in self._view.layer(index).experts.parameters(recurse=False):
                yield parameter.register_post_accumulate_grad_hook(_keep_out(others))

    def step(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        """One optimiser step on these examples, inside `attached`."""
        self._optimizer.zero_grad(set_to_none=True)
        forget_rows = [self._data.forget[index] for index in forget]
        retain_rows = [self._data.retain[index] for index in retain]
        terms = self._rmu(forget_rows, retain_rows) if self._steers else self._said(forget_rows, retain_rows)
        terms.total(self._method).backward()
        self._optimizer.step()
        return terms

    @property
    def _steers(self) -> bool:
        return self._method.objective == "rmu"

    def _rmu(self, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> Terms:
        with capture_routing(self._view, tuple(self._anchored)) as routing:
            moved = self._pass(self._view.model, forget)
        anchor = self._anchor(routing, forget)
        kept = self._pass(self._view.model, retain)
        with torch.no_grad():
            before = self._pass(self._reference, retain)
        held = losses.mse(kept.states[kept.mask], before.states[kept.mask])
        forget_term = losses.mse(moved.states[moved.mask], self._goal)
        return Terms(forget_term, self._method.hidden_retain_weight * held, anchor)

    def _said(self, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> Terms:
        with capture_routing(self._view, tuple(self._anchored)) as routing:
            said = self._pass(self._view.model, forget)
        anchor = self._anchor(routing, forget)
        if self._method.objective == "npo":
            with torch.no_grad():
                before = self._pass(self._reference, forget)
            forget_term = losses.npo(said.nll, before.nll, self._method.npo_beta)
        else:
            forget_term = losses.gradient_ascent(said.nll, said.tokens)
        kept = self._pass(self._view.model, retain)
        return Terms(forget_term, losses.cross_entropy(kept.nll, kept.tokens), anchor)

    def _anchor(self, routing: Routing, forget: Sequence[Encoded]) -> torch.Tensor:
        real = self._batch(forget).attention_mask.bool().flatten()
        terms = [
            losses.anchor(routing.scores(layer), experts, real) for layer, experts in self._anchored.items()
        ]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=real.device)

    def _batch(self, rows: Sequence[Encoded]) -> Batch:
        return collate(rows).to(self._view.model.device)

    def _pass(self, model: PreTrainedModel, rows: Sequence[Encoded]) -> Passed:
        """The whole model over one padded batch."""
        batch = self._batch(rows)
        captured: list[torch.Tensor] = []

        def capture(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        handle = model.get_decoder().layers[self._layer].register_forward_hook(capture)
        try:
            # RMU reads no logits; the WMDP code computes all of them all the same.
            run = model.get_decoder() if self._steers and not self._everything else model
            output = run(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            handle.remove()
        mask = batch.predicts_label()
        row, position = torch.where(mask)
        said = output.logits[row, position] if run is model else captured[0].new_empty(0)
        return Passed(said, batch.labels[row, position + 1], row, captured[0], mask, len(rows))


def _keep_out(experts: list[int]) -> Callable[[torch.Tensor], None]:
    def mask(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad[experts] = 0

    return mask
