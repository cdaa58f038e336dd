"""From examples to padded batches: token ids, which of them are labels, and a batch order without state."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from seuf_core.data.records import Example
from seuf_core.errors import DataError

T = TypeVar("T")

IGNORE_INDEX = -100
# The token id that fills padding: every vocabulary has it, and it is masked everywhere. A config's pad_token_id
# may be missing, or -1.
PADDING = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence. Tokens from position `labels_from` (at least 1) on are labels; those before are prompt.

    truncated: whether max_length cut tokens off.
    """

    input_ids: list[int]
    labels_from: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right; each [B, S] int64: attention_mask 1 = real token, labels -100 = no label."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def predicts_label(self) -> torch.Tensor:
        """[B, S], true at the positions whose next token is a label."""
        mask = torch.zeros_like(self.labels, dtype=torch.bool)
        mask[:, :-1] = self.labels[:, 1:] != IGNORE_INDEX
        return mask


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int) -> Encoded:
    """`encode_pairs` of one pair."""
    return encode_pairs(tokenizer, [(prompt, completion)], max_length)[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Every example as one sequence, in order; a running text longer than `max_length` as several.

    Raises as `encode_pairs` does.
    """
    return [piece for pieces in _pieces(tokenizer, examples, max_length) for piece in pieces]


def encode_alternatives(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, default: str
) -> list[Encoded]:
    """One sequence for each of `encode_examples`: the same prompt, then the alternative, or `default` without one.

    A running text has no prompt, so its alternative stands alone, and once for each of the text's pieces. Of a prompt
    that is cut, more may stay before a short alternative than before a long answer.

    Raises as `encode_pairs` does.
    """
    pairs = [(example.prompt, example.alternative or default) for example in examples]
    encoded = encode_pairs(tokenizer, pairs, max_length)
    pieces = _pieces(tokenizer, examples, max_length)
    return [one for one, of in zip(encoded, pieces, strict=True) for _ in of]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[list[Encoded]]:
    """The sequences of each example: one, or several of a long running text."""
    pairs = [(example.prompt, example.completion) for example in examples]
    return [
        _windows(tokenizer, text, max_length) if whole.truncated and not prompt else [whole]
        for (prompt, text), whole in zip(pairs, encode_pairs(tokenizer, pairs, max_length), strict=True)
    ]


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[Encoded]:
    """A text in pieces of at most `max_length` tokens; every token is a label once, as in the whole text.

    Each piece but the first begins with the token before it, which is its context and no label.
    """
    leading, tokens = _leading_specials(tokenizer), _tokens(tokenizer, [text])[0]
    size = max_length - len(leading)
    first = Encoded([*leading, *tokens[:size]], max(1, len(leading)), truncated=False)
    step = max(1, size - 1)
    starts = range(size, len(tokens), step)
    return [first] + [
        Encoded([*leading, *tokens[start - 1 : start + step]], len(leading) + 1, truncated=False)
        for start in starts
    ]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[Encoded]:
    """Tokens of prompt and completion of each pair, in order.

    The prompt's tokens are those it has alone, so that all completions of one prompt share them and the first
    label never moves. In front stands what the tokenizer itself puts there (a BOS, where the model has one).
    Without either, the first token has nothing before it and is no label. A prompt too long loses its start,
    so that the completion is always there; a completion too long loses its end.

    Raises:
        DataError: no_label_tokens, when a completion leaves nothing to predict.
    """
    leading = _leading_specials(tokenizer)
    joined = [(prompt, _spaced(prompt, completion)) for prompt, completion in pairs]
    alone = _tokens(tokenizer, [prompt for prompt, _ in joined])
    whole = _tokens(tokenizer, [prompt + completion for prompt, completion in joined])
    encoded = []
    for number, ((_, completion), before, both) in enumerate(zip(joined, alone, whole, strict=True), start=1):
        # A sentencepiece tokenizer puts a space of its own before a text, so a completion tokenised by itself
        # has one too many; only where the boundary falls inside a token is that the lesser evil.
        natural = both[: len(before)] == before
        after = both[len(before) :] if natural else _tokens(tokenizer, [completion])[0]
        encoded.append(_cut(leading, before, after, max_length))
        if encoded[-1].labels_from >= len(encoded[-1].input_ids):
            raise DataError(
                "no_label_tokens",
                f"Text {number} of {len(pairs)} has no token to predict: it is too short.",
                "Give it a prompt or a longer text.",
            )
    return encoded


def _spaced(prompt: str, completion: str) -> str:
    """The completion with a space in front where prompt and completion would otherwise run into one word.

    Not where either side has white space already, nor beside scripts that are written without spaces.
    """
    edges = prompt[-1:] + completion[:1]
    if not prompt or any(char.isspace() or unicodedata.east_asian_width(char) in "WF" for char in edges):
        return completion
    return f" {completion}"


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: what is too long for the model is cut below.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing."""
    empty = tokenizer("")["input_ids"]
    return list(empty[:1]) if empty and empty[0] == tokenizer.bos_token_id else []


def _cut(leading: list[int], before: list[int], after: list[int], max_length: int) -> Encoded:
    fewest = len(leading) + min(1, len(before))
    kept_after = after[: max(1, max_length - fewest)]
    room = max(0, max_length - len(leading) - len(kept_after))
    kept_before = before[max(0, len(before) - room) :]
    ids = [*leading, *kept_before, *kept_after]
    truncated = len(ids) < len(leading) + len(before) + len(after)
    return Encoded(ids, max(1, len(ids) - len(kept_after)), truncated)


def collate(rows: Sequence[Encoded], pad_token_id: int = PADDING) -> Batch:
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
    """`bucketed` rows as batches."""
    for bucket in bucketed(rows, lambda row: len(row.input_ids), tokens_per_batch):
        yield collate(bucket, pad_token_id)


def bucketed(items: Sequence[T], length: Callable[[T], int], tokens_per_batch: int) -> Iterator[list[T]]:
    """Items of like length together, shortest first, for passes whose result does not depend on the order.

    At most `tokens_per_batch` padded tokens each; an item longer than that is alone.
    """
    ordered = sorted(items, key=length)
    start = 0
    for end in range(1, len(ordered) + 1):
        # Sorted, so the next item would set the padded length of its batch.
        if end == len(ordered) or (end - start + 1) * length(ordered[end]) > tokens_per_batch:
            yield ordered[start:end]
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
        order = _epoch_order(num_examples, seed, epoch)
        indices += order[offset : offset + batch_size - len(indices)]
    return indices


@lru_cache(maxsize=8)  # an epoch's order is the same for all of its steps
def _epoch_order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(num_examples, generator=generator).tolist())
