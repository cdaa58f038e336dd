"""Probes: does the model still choose the right answer, and does it still say it?

One forward pass over every (prompt, choice) gives both: the choice is the one with the highest mean
log-probability per token, and the open answer is right when greedy decoding would produce exactly the tokens of
the true answer (each is the argmax given the ones before it, which is what greedy decoding feeds itself).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from seuf_core.data.batches import Encoded, bucketed, encode_pair
from seuf_core.data.records import Probe
from seuf_core.moe.forward import Forward
from seuf_core.moe.head import negative_log_likelihood, per_token
from seuf_core.moe.memory import within_memory


@dataclass(frozen=True)
class ProbeScore:
    """What the model did with one probe. `probability` is a softmax over the choices' mean log-probabilities;
    with a single choice it is exp(mean log-probability) of the answer."""

    chose_right: bool
    ranked_last: bool
    open_right: bool
    probability: float


@dataclass(frozen=True)
class EncodedProbe:
    """A probe as token sequences, one a choice, made once and scored many times."""

    probe: Probe
    sequences: tuple[Encoded, ...]


def sequences_of(probes: Iterable[EncodedProbe]) -> list[Encoded]:
    """Every choice of every probe, in order."""
    return [sequence for probe in probes for sequence in probe.sequences]


def encode_probes(
    tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], max_length: int
) -> list[EncodedProbe]:
    """Tokenise every choice of every probe after its prompt."""
    return [
        EncodedProbe(
            probe, tuple(encode_pair(tokenizer, probe.prompt, choice, max_length) for choice in probe.choices)
        )
        for probe in probes
    ]


@torch.no_grad()
def score_probes(
    forward: Forward,
    probes: Sequence[EncodedProbe],
    *,
    tokens_per_batch: int = 1 << 15,
) -> list[ProbeScore]:
    """Score every probe with the model as it stands; where memory runs out, fewer sequences at once.

    Args:
        tokens_per_batch: padded tokens of one call of `forward`, which runs them in pieces of its own, one layer
            after the other over all of them. Of logits there are a few positions at a time (seuf_core.moe.head).

    Raises:
        MethodError: `out_of_memory`, when not even single sequences fit.
    """
    flat = [(p, c) for p, probe in enumerate(probes) for c in range(len(probe.sequences))]
    log_probs = [[0.0] * len(probe.sequences) for probe in probes]
    greedy = [False] * len(probes)
    for chunk in bucketed(flat, lambda pc: len(probes[pc[0]].sequences[pc[1]].input_ids), tokens_per_batch):
        means, hits = _score_sequences(forward, [probes[p].sequences[c] for p, c in chunk])
        for (p, c), mean, hit in zip(chunk, means, hits, strict=True):
            log_probs[p][c] = mean
            if c == probes[p].probe.answer:
                greedy[p] = hit
    return [
        _judge(probe.probe.answer, scores, hit)
        for probe, scores, hit in zip(probes, log_probs, greedy, strict=True)
    ]


def _score_sequences(forward: Forward, sequences: list[Encoded]) -> tuple[list[float], list[bool]]:
    """Of each sequence: the mean log-probability of its label tokens, and whether each of them is the likeliest."""
    longest = max(len(row.input_ids) for row in sequences)
    answers = within_memory(lambda: forward.answers(sequences), lambda: forward.halve(sequences), longest)
    said = per_token(forward.view, answers, _log_probability_and_miss, answers.target)  # [P, 2]
    sums = said.new_zeros(len(sequences), 2).index_add_(0, answers.row, said)
    counts = torch.bincount(answers.row, minlength=len(sequences))
    return (sums[:, 0] / counts).tolist(), (sums[:, 1] == 0).tolist()


def _log_probability_and_miss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[C, 2]: log p of the token, and 1 where another one is likelier."""
    missed = (logits.argmax(dim=-1) != target).float()
    return torch.stack([-negative_log_likelihood(logits, target), missed], dim=-1)


def _judge(answer: int, log_probs: list[float], greedy: bool) -> ProbeScore:
    values = torch.tensor(log_probs)
    right = values[answer]
    probability = float(values.exp()[0]) if len(log_probs) == 1 else float(values.softmax(0)[answer])
    others = torch.cat([values[:answer], values[answer + 1 :]])
    return ProbeScore(
        chose_right=bool((right > others).all()),  # a tie is not knowing
        ranked_last=bool(others.numel() and (right < others).all()),
        open_right=greedy,
        probability=probability,
    )


def summarise(probes: Sequence[EncodedProbe], scores: Sequence[ProbeScore]) -> list[dict[str, Any]]:
    """Mean figures per set and domain, as rows {set, domain, name, value, n, chance}.

    Names: `choice` (share of probes whose true answer is the likeliest choice; only for two or more choices),
    `open` (share answered greedily), `probability` (mean), `ranked_last` (share whose true answer is the
    unlikeliest: knowledge that was inverted shows here).
    """
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[int]] = {}
    for i, encoded in enumerate(probes):
        groups.setdefault((encoded.probe.set, encoded.probe.domain), []).append(i)
    for (set_name, domain), members in sorted(groups.items()):
        choices = [len(probes[i].sequences) for i in members]
        chance = sum(1 / c for c in choices) / len(choices) if min(choices) > 1 else 0.0
        figures = {
            "open": (sum(scores[i].open_right for i in members), 0.0),
            "probability": (sum(scores[i].probability for i in members), chance),
        }
        if min(choices) > 1:
            figures["choice"] = (sum(scores[i].chose_right for i in members), chance)
            figures["ranked_last"] = (sum(scores[i].ranked_last for i in members), chance)
        rows += [
            {
                "set": set_name,
                "domain": domain,
                "name": name,
                "value": total / len(members),
                "n": len(members),
                "chance": chance_level,
            }
            for name, (total, chance_level) in sorted(figures.items())
        ]
    return rows
