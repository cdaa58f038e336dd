"""What a model says of label tokens: now, with a graph, and before training, computed once and kept on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from seuf_core.data.batches import Encoded, collate
from seuf_core.moe.forward import AnswerLogits, answer_logits
from seuf_core.moe.view import MoEView
from seuf_core.unlearning import losses


@dataclass(frozen=True)
class Said:
    """What the model says of the P label tokens of B examples, and what it said of them before training.

    logits: [P, V] in the model's dtype; target: [P] token ids; row: [P], which example, from 0; size: B.
    reference_nll: l of each example before training, [B] fp32. reference_logits: [P, V].
    A reference that was not asked for is an empty tensor.
    """

    logits: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    size: int
    reference_nll: torch.Tensor
    reference_logits: torch.Tensor

    @cached_property
    def token_nll(self) -> torch.Tensor:
        """-log p of each label token, [P] fp32."""
        return losses.token_nll(self.logits, self.target)

    @property
    def nll(self) -> torch.Tensor:
        """l of each example, [B] fp32."""
        return losses.per_example(self.token_nll, self.row, self.size)

    @property
    def tokens(self) -> torch.Tensor:
        """Number of label tokens of each example, [B] int64."""
        return torch.bincount(self.row, minlength=self.size)


class Reference:
    """What the model says of a list of examples as it is now, which is before training.

    Memory, on the CPU: `nll` 4 bytes an example; `logits` 4 * P * V bytes of an fp32 model and 2 * P * V of a
    bf16 one, P label tokens in all: they stay in the model's own dtype, so nothing is rounded.
    """

    def __init__(
        self, view: MoEView, examples: Sequence[Encoded], batch_size: int, *, nll: bool, logits: bool
    ) -> None:
        """
        Args:
            nll: whether l is kept; logits: whether the logits are. With neither there is no pass.
        """
        self.nll = torch.empty(0)
        self.logits: list[torch.Tensor] = []
        summed = []
        for answers in _passes(view, examples, batch_size) if nll or logits else ():
            if nll:
                per_token = losses.token_nll(answers.logits, answers.target)
                summed.append(losses.per_example(per_token, answers.row, answers.num_sequences).cpu())
            if logits:
                counts = torch.bincount(answers.row, minlength=answers.num_sequences).tolist()
                # Copies: a view would keep the whole batch alive.
                self.logits += [part.clone() for part in answers.logits.cpu().split(counts)]
        if summed:
            self.nll = torch.cat(summed)

    def said(self, answers: AnswerLogits, first: int, indices: Sequence[int]) -> Said:
        """What `answers` hold of these examples, which are the sequences from `first` on, beside their reference."""
        # Label tokens stand in the order of their sequences, so this is a slice: a view, no copy.
        start, end = (int((answers.row < row).sum()) for row in (first, first + len(indices)))
        device = answers.logits.device
        logits = [self.logits[index] for index in indices] if self.logits else []
        return Said(
            answers.logits[start:end],
            answers.target[start:end],
            answers.row[start:end] - first,
            len(indices),
            self.nll[list(indices)].to(device) if len(self.nll) else self.nll,
            torch.cat(logits).to(device) if logits else torch.empty(0),
        )


@torch.no_grad()
def _passes(view: MoEView, examples: Sequence[Encoded], batch_size: int) -> Iterator[AnswerLogits]:
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size]).to(view.model.device)
        yield answer_logits(view.model, batch)
