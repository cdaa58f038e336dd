"""The mathematics of unlearning: pure functions from tensors to one scalar.

Letters: B examples, S positions, P label tokens, V vocabulary, H hidden, E experts, T tokens. For one example
`l` = summed negative log-likelihood over its label tokens, `lbar` = l / number of label tokens.
Prompt and padding never reach these functions: logits come from the P positions before a label token
(seuf_core.moe.forward), hidden states with a mask. Everything accumulates in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sequence_nll(
    logits: torch.Tensor, target: torch.Tensor, row: torch.Tensor, num_sequences: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of the label tokens of each example, and how many there are.

    Args:
        logits: [P, V], one row a label token, from the position before it; target: [P] int64 token ids;
        row: [P] int64, which example the label token belongs to; num_sequences: B.

    Returns:
        (l [B] fp32 in nats, number of label tokens [B] int64).
    """
    nll = F.cross_entropy(logits.float(), target, reduction="none")
    summed = torch.zeros(num_sequences, dtype=nll.dtype, device=nll.device).index_add(0, row, nll)
    return summed, torch.bincount(row, minlength=num_sequences)


def cross_entropy(nll: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all label tokens of the batch, as transformers' own loss: sum of l / sum of tokens."""
    return nll.sum() / tokens.sum().clamp(min=1)


def gradient_ascent(nll: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-lbar, averaged over examples (SEUF's GA; the forget term of GradDiff too). Unbounded below."""
    return -(nll / tokens.clamp(min=1)).mean()


def npo(nll: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimisation: mean of -(2/b) log sigmoid(b (l - l_ref)), arXiv 2404.05868 Eq. 3.

    `nll` is the sum l over the label tokens, and so is `reference_nll`, from the model before training.
    At the start it equals (2/b) log 2 and its gradient is that of gradient ascent; it goes to 0 as l grows.
    """
    log_odds: torch.Tensor = F.logsigmoid(beta * (nll - reference_nll))
    return -log_odds.mean() * (2.0 / beta)


def masked_mse(states: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of `mask` and over H of the squared difference (RMU, arXiv 2403.03218 section 4).

    Args:
        states: [B, S, H]; target: [B, S, H] or broadcastable to it; mask: [B, S], true for real tokens.
    """
    squared = (states.float() - target.float()).square().mean(dim=-1)
    return (squared * mask).sum() / mask.sum().clamp(min=1)


def control_vector(hidden_size: int, seed: int) -> torch.Tensor:
    """RMU's u: uniform in [0, 1)^H, normalised to length 1, fixed by the seed. fp32 [H]."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(hidden_size, generator=generator)
    unit: torch.Tensor = vector / vector.norm()
    return unit


def anchor(scores: torch.Tensor, targets: tuple[int, ...], mask: torch.Tensor) -> torch.Tensor:
    """Router anchor, Eq. 3 of SEUF: ||s - a||^2 summed over experts, averaged over real tokens.

    `a` is 1/M on each of the M target experts of this layer (M = 1: the paper's one-hot vector).

    Args:
        scores: router distribution before top-K, [T, E] fp32; mask: [T], true for real tokens.
    """
    goal = torch.zeros(scores.shape[1], dtype=scores.dtype, device=scores.device)
    goal[list(targets)] = 1.0 / len(targets)
    squared = (scores - goal).square().sum(dim=-1)
    return (squared * mask).sum() / mask.sum().clamp(min=1)
