"""One short training loop: AdamW, warm-up and cosine, padded batches, load balance and specialisation.

Shapes: B sentences, S tokens a sentence, N = B * S tokens, E experts, L layers, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from seuf_core.moe.routing import Routing, capture_routing
from seuf_core.moe.view import moe_view
from seuf_core.reference.architecture import Recipe


class Progress(Protocol):
    """Called after every step: steps done, their total, and the step's mean loss of answer tokens in nats."""

    def __call__(self, step: int, total: int, loss: float) -> None: ...


@dataclass(frozen=True)
class Sentence:
    """Token ids of one training sentence; the first `answer_start` are the prompt. `domain` counts from 0."""

    ids: list[int]
    answer_start: int
    domain: int


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, S] int64, right padded
    weights: Tensor  # [B, S] float32, weight of predicting ids[:, i]; 0 on the first token and on padding
    answers: Tensor  # [B, S] bool, the answer tokens
    domains: Tensor  # [B, S] int64, -1 on padding


def collate(sentences: Sequence[Sentence], pad: int, prompt_weight: float) -> Batch:
    """Right-pad; the prompt's tokens count `prompt_weight`, the answer's (and the end mark's) count 1."""
    B, S = len(sentences), max(len(sentence.ids) for sentence in sentences)
    ids = torch.full((B, S), pad)
    weights, domains = torch.zeros(B, S), torch.full((B, S), -1)
    answers = torch.zeros(B, S, dtype=torch.bool)
    for row, sentence in enumerate(sentences):
        length = len(sentence.ids)
        ids[row, :length] = torch.tensor(sentence.ids)
        weights[row, 1 : sentence.answer_start] = prompt_weight
        weights[row, sentence.answer_start : length] = 1.0
        answers[row, sentence.answer_start : length] = True
        domains[row, :length] = sentence.domain
    return Batch(ids, weights, answers, domains)


def domain_router_means(router_logits: Tensor, domains: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """Mean router distribution of each domain, and each domain's share of the tokens.

    Args:
        router_logits: [N, E]; domains: [N], -1 = do not count.

    Returns:
        [D, E] rows summing to 1 (a domain without tokens: zeros), and [D] summing to 1; fp32.
    """
    probabilities = router_logits.float().softmax(-1)
    one_hot = (domains[:, None] == torch.arange(num_domains, device=domains.device)).float()  # [N, D]
    counts = one_hot.sum(0)
    return one_hot.T @ probabilities / counts.clamp_min(1)[:, None], counts / counts.sum().clamp_min(1)


def mutual_information(means: Tensor, shares: Tensor) -> Tensor:
    """I(domain; expert) in nats, for p(domain) = shares [D] and p(expert | domain) = means [D, E]."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-12).log()).sum(-1)

    return entropy((shares[:, None] * means).sum(0)) - (shares * entropy(means)).sum()


def load_balance(router_logits: Tensor, selected: Tensor, counted: Tensor) -> Tensor:
    """Switch loss, E * sum over experts of (share of routing slots) * (mean router probability); 1 when even.

    Args:
        router_logits: [N, E]; selected: [N, K] expert numbers; counted: [N] bool.

    Source: arXiv 2101.03961, Eq. 4.
    """
    E = router_logits.shape[-1]
    slots = torch.bincount(selected[counted].flatten(), minlength=E).float()
    probabilities = router_logits[counted].float().softmax(-1).mean(0)
    return E * (slots / slots.sum() * probabilities).sum()


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def batches(
    sentences: Sequence[Sentence], recipe: Recipe, generator: torch.Generator
) -> Iterator[list[Sentence]]:
    """Endless epochs; each is shuffled, then sorted by length within groups of eight batches."""
    size, group = recipe.batch_size, recipe.batch_size * 8
    while True:
        order = torch.randperm(len(sentences), generator=generator).tolist()
        for start in range(0, len(order), group):
            chunk = sorted(order[start : start + group], key=lambda i: len(sentences[i].ids))
            cuts = list(range(0, len(chunk), size))
            for cut in torch.randperm(len(cuts), generator=generator).tolist():
                yield [sentences[i] for i in chunk[cuts[cut] : cuts[cut] + size]]


def train(
    model: PreTrainedModel,
    sentences: Sequence[Sentence],
    recipe: Recipe,
    tau: float,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train all parameters in place on `sentences`; the same inputs and thread count give the same weights.

    Args:
        tau: lower bound in nats asked of each layer's mutual information of domain and router; 0 = none.
    """
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(step, recipe))
    num_domains = 1 + max(sentence.domain for sentence in sentences)
    stream = batches(sentences, recipe, torch.Generator().manual_seed(seed))
    model.train()
    with capture_routing(moe_view(model)) as routing:
        for step in range(recipe.steps):
            batch = collate(next(stream), model.config.pad_token_id, recipe.prompt_weight)
            loss, answer_loss = language_loss(model, batch)
            loss = loss + routing_loss(routing, batch.domains.flatten(), num_domains, recipe, tau)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            if progress is not None:
                progress(step + 1, recipe.steps, float(answer_loss))
    model.train(False)


def language_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(weighted mean negative log-likelihood in nats, the plain mean over answer tokens, detached).

    Padding is on the right and attention causal, so no mask is needed: real tokens cannot see it. The head is
    applied only where a token is predicted.
    """
    hidden = model.model(batch.ids, use_cache=False).last_hidden_state[:, :-1]
    weights = batch.weights[:, 1:]
    predicted = weights > 0
    logits = model.lm_head(hidden[predicted]).float()
    losses = cross_entropy(logits, batch.ids[:, 1:][predicted], reduction="none")
    answers = losses[batch.answers[:, 1:][predicted]]
    return (losses * weights[predicted]).sum() / weights.sum(), answers.mean().detach()


def routing_loss(routing: Routing, domains: Tensor, num_domains: int, recipe: Recipe, tau: float) -> Tensor:
    """Sum over layers of balance_weight * load_balance + specialisation_weight * relu(tau - information).

    `information` is the mutual information of domain and expert. Even load over all domains together and
    experts that prefer one domain do not exclude each other.
    """
    total = torch.zeros(())
    for layer, logits in routing.logits.items():
        balance = load_balance(logits, routing.indices[layer], domains >= 0)
        information = mutual_information(*domain_router_means(logits, domains, num_domains))
        total = total + recipe.balance_weight * balance
        total = total + recipe.specialisation_weight * torch.relu(tau - information)
    return total
