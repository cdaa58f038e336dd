"""From examples to padded batches: token ids, which of them are labels, and a batch order without state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from seuf_core.data.records import Example

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence. Tokens from position `labels_from` on are labels; those before are prompt.

    truncated: whether max_length cut tokens off its end.
    """

    input_ids: list[int]
    labels_from: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right. input_ids, attention_mask (1 = real token), labels (-100 = no label): [B, S] int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int) -> Encoded:
    """Tokens of the prompt, then of the completion, each tokenised by itself so that the boundary never moves.

    The prompt gets the tokenizer's own special tokens at its start (a BOS, where the model has one). Without a
    prompt the first token has nothing before it and is no label. A prompt too long loses its start, so that the
    completion is always there; a completion too long loses its end.
    """
    prefix = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    bos = _leading_specials(tokenizer)
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
    kept_answer = answer[: max(1, max_length - len(bos) - 1)] if prefix or bos else answer[:max_length]
    room = max_length - len(bos) - len(kept_answer)
    kept_prefix = prefix[len(prefix) - room :] if len(prefix) > room else prefix
    ids = [*bos, *kept_prefix, *kept_answer]
    truncated = len(kept_answer) < len(answer) or len(kept_prefix) < len(prefix)
    return Encoded(ids, max(1, len(ids) - len(kept_answer)), truncated)


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing."""
    empty = tokenizer("")["input_ids"]
    return list(empty[:1]) if empty and empty[0] == tokenizer.bos_token_id else []


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Every example as one sequence, in order."""
    return [encode_pair(tokenizer, e.prompt, e.completion, max_length) for e in examples]


def collate(rows: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Pad to the longest row. Which token fills the padding does not matter: it is masked everywhere."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[i, :n] = torch.tensor(row.input_ids)
        attention_mask[i, :n] = 1
        labels[i, row.labels_from : n] = input_ids[i, row.labels_from : n]
    return Batch(input_ids, attention_mask, labels)


def length_bucketed(rows: Sequence[Encoded], tokens_per_batch: int, pad_token_id: int) -> Iterator[Batch]:
    """Batches of rows of like length, shortest first, at most `tokens_per_batch` padded tokens each (one row may
    be longer). For passes whose result does not depend on the order."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    start = 0
    for end in range(1, len(ordered) + 1):
        # Sorted, so the next row would set the padded length of its batch.
        if end == len(ordered) or (end - start + 1) * len(ordered[end].input_ids) > tokens_per_batch:
            yield collate(ordered[start:end], pad_token_id)
            start = end


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples step `step` (from 0) trains on: consecutive pieces of one seeded permutation an epoch.

    A pure function of its arguments, so a resumed run needs no random state. Every epoch sees every example
    once; a batch may end one epoch and begin the next.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), num_examples)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        permutation = torch.randperm(num_examples, generator=generator).tolist()
        indices += permutation[offset : offset + batch_size - len(indices)]
    return indices
