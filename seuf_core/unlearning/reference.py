"""What a model says of label tokens: now, with a graph, and before training, computed once and kept on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from seuf_core.data.batches import Encoded
from seuf_core.moe import head
from seuf_core.moe.forward import Answers, Forward
from seuf_core.moe.memory import within_memory
from seuf_core.moe.passes import tail
from seuf_core.moe.view import MoEView
from seuf_core.unlearning import losses


@dataclass(frozen=True)
class Said:
    """What the model says of the P label tokens of B examples, and what it said of them before training.

    answers: theirs, rows from 0. reference_nll: l of each example before training, [B] fp32. reference: what the
    logits before training are made of, states [P, H] or the logits [P, V] themselves (`Reference`).
    A reference that was not asked for is an empty tensor.
    """

    view: MoEView
    answers: Answers
    reference_nll: torch.Tensor
    reference: torch.Tensor
    reference_is_logits: bool

    @cached_property
    def token_nll(self) -> torch.Tensor:
        """-log p of each label token, [P] fp32."""
        return head.token_nll(self.view, self.answers)

    @property
    def nll(self) -> torch.Tensor:
        """l of each example, [B] fp32."""
        return losses.per_example(self.token_nll, self.answers.row, self.answers.num_sequences)

    @property
    def tokens(self) -> torch.Tensor:
        """Number of label tokens of each example, [B] int64."""
        return torch.bincount(self.answers.row, minlength=self.answers.num_sequences)

    def mean(self, formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Mean over the label tokens of a formula of their logits [C, V] and ids [C]."""
        return head.per_token(self.view, self.answers, formula, self.answers.target).mean()

    def mean_beside_reference(
        self, formula: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Mean over the label tokens of a formula of their logits, those before training and their ids."""

        def beside(logits: torch.Tensor, kept: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return formula(logits, self._reference_logits(kept), target)

        return head.per_token(self.view, self.answers, beside, self.reference, self.answers.target).mean()

    @torch.no_grad()
    def _reference_logits(self, kept: torch.Tensor) -> torch.Tensor:
        return kept if self.reference_is_logits else tail(self.view, kept)


class Reference:
    """What the model says of a list of examples as it is now, which is before training.

    Memory, on the CPU, of P label tokens in all, in the model's own dtype, so that nothing is rounded: `nll` takes 4
    bytes an example; `logits` the states before norm and head, H numbers a token, from which the logits are made
    again a chunk at a time. Where the vocabulary is no larger than H, or the head itself is trained and would make
    others, the logits are kept: V numbers a token.
    """

    @torch.no_grad()
    def __init__(
        self,
        forward: Forward,
        examples: Sequence[Encoded],
        batch_size: int,
        *,
        nll: bool = False,
        logits: bool = False,
        head_is_trained: bool = False,
    ) -> None:
        """
        Args:
            nll: whether l is kept; logits: whether the logits are. With neither there is no pass.

        Raises:
            MethodError: `out_of_memory`, when not even single sequences fit.
        """
        self._view, model = forward.view, forward.view.model
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._is_logits = head_is_trained or vocab_size <= model.config.hidden_size
        self.nll = torch.empty(0)
        self.kept: list[torch.Tensor] = []
        summed = []
        for answers in _passes(forward, examples, batch_size) if nll or logits else ():
            if nll:
                per_token = head.token_nll(self._view, answers)
                summed.append(losses.per_example(per_token, answers.row, answers.num_sequences).cpu())
            if logits:
                counts = torch.bincount(answers.row, minlength=answers.num_sequences).tolist()
                kept = self._logits(answers) if self._is_logits else answers.states
                # Copies: a view would keep the whole batch alive.
                self.kept += [part.clone() for part in kept.cpu().split(counts)]
        if summed:
            self.nll = torch.cat(summed)

    def _logits(self, answers: Answers) -> torch.Tensor:
        return head.per_token(self._view, answers, lambda logits: logits)

    def said(self, answers: Answers, first: int, indices: Sequence[int]) -> Said:
        """What `answers` hold of these examples, which are the sequences from `first` on, beside their reference."""
        # Label tokens stand in the order of their sequences, so this is a slice: a view, no copy.
        start, end = (int((answers.row < row).sum()) for row in (first, first + len(indices)))
        device = answers.states.device
        kept = [self.kept[index] for index in indices] if self.kept else []
        theirs = Answers(
            answers.states[start:end], answers.target[start:end], answers.row[start:end] - first, len(indices)
        )
        return Said(
            self._view,
            theirs,
            self.nll[list(indices)].to(device) if len(self.nll) else self.nll,
            torch.cat(kept).to(device) if kept else torch.empty(0),
            self._is_logits,
        )


def _passes(forward: Forward, examples: Sequence[Encoded], batch_size: int) -> Iterator[Answers]:
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        longest = max(len(row.input_ids) for row in rows)
        yield within_memory(partial(forward.answers, rows), partial(forward.halve, rows), longest)
