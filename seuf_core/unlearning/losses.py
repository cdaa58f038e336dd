"""The mathematics of unlearning: pure functions from tensors to one scalar, or to one number a label token.

Letters: B examples, S positions, P label tokens, V vocabulary, H hidden, E experts, T tokens. For one example
`l` = summed negative log-likelihood over its label tokens, `lbar` = l / number of label tokens; for one label
token `z` = its logits [V], `y` = the token, `p` = softmax(z)_y. `b` and `d` are the settings of each formula.
Prompt and padding never reach these functions: logits come from the P positions before a label token
(seuf_core.moe.head), hidden states with a mask. Everything accumulates in fp32.

Means. Where the paper's formula is over examples (l or lbar), the mean is over the B examples, so that a long
answer weighs no more than a short one. Where it is over tokens, it is over the P label tokens of the batch, as in the
authors' code and in open-unlearning (https://github.com/locuslab/open-unlearning, src/trainer/utils.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def per_example(values: torch.Tensor, row: torch.Tensor, num_examples: int) -> torch.Tensor:
    """Sums by example, [B] fp32; of -log p, that is l.

    Args:
        values: [P] fp32; row: [P] int64, which example each belongs to; num_examples: B.
    """
    return torch.zeros(num_examples, dtype=values.dtype, device=values.device).index_add(0, row, values)


# Of l and lbar: mean over examples.


def gradient_ascent(nll: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-lbar, mean over examples (SEUF's GA, arXiv 2411.18797; the forget term of GradDiff too). Unbounded below.

    Args:
        nll: l, [B] fp32; tokens: number of label tokens, [B].
    """
    return -(nll / tokens).mean()


def npo(nll: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimisation: -(2/b) log sigmoid(b (l - l_ref)), arXiv 2404.05868 Eq. 3; mean over examples.

    `nll` is the sum l over the label tokens, and so is `reference_nll`, from the model before training: with the
    model under training as its own reference (SEUF's released code) it is plain ascent, and a difference of raw
    logits (MUSE's) is no likelihood. At the start it equals (2/b) log 2; as l grows it goes to 0. b -> 0: its
    gradient becomes that of ascent on l.
    """
    return _softly(nll - reference_nll, beta)


def simnpo(nll: torch.Tensor, tokens: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """SimNPO: -(2/b) log sigmoid(b (lbar - d)), arXiv 2410.07163; mean over examples. No reference.

    The paper writes -(b/|y|) log p - gamma inside the sigmoid; here gamma = b d, as in its code and open-unlearning's.
    b -> 0: its gradient becomes that of gradient ascent.
    """
    return _softly(nll / tokens - margin, beta)


def dpo(
    preferred_nll: torch.Tensor,
    preferred_reference_nll: torch.Tensor,
    nll: torch.Tensor,
    reference_nll: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DPO: -(2/b) log sigmoid(b ((l_w,ref - l_w) - (l_l,ref - l_l))), arXiv 2305.18290 Eq. 7; mean over examples.

    w is the alternative answer, l (lost) what is to be forgotten; each l is a sum over label tokens, [B] fp32.
    The factor 2/b puts it on NPO's scale (arXiv 2404.05868, which is this without w). b -> 0: its gradient
    becomes that of l_w - l_l.
    """
    return _softly((preferred_reference_nll - preferred_nll) - (reference_nll - nll), beta)


def _softly(odds: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean of -(2/b) log sigmoid(b x): falls with x at a slope of 1 around 0, and not at all far above it."""
    log_odds: torch.Tensor = F.logsigmoid(beta * odds)
    return -log_odds.mean() * (2.0 / beta)


# Of single tokens: mean over the label tokens of the batch.


def cross_entropy(nll: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all label tokens of the batch, as transformers' own loss: sum of l / sum of tokens."""
    return nll.sum() / tokens.sum()


def wga(nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Weighted gradient ascent: p^b log p, weights detached, arXiv 2502.19301; mean over label tokens.

    Minimising it pushes log p down, hardest where the model is still sure. nll: -log p of each label token, [P].
    b -> 0: gradient ascent (mean over tokens).
    """
    return -((-nll.detach()).exp().pow(beta) * nll).mean()


def satimp(nll: torch.Tensor, beta1: float, beta2: float) -> torch.Tensor:
    """SatImp: p^b1 (1-p)^b2 log p, weights detached, arXiv 2505.11953; mean over label tokens.

    Saturation p^b1 leaves alone what is forgotten already, importance (1-p)^b2 what is sure by grammar.
    nll: -log p of each label token, [P]. b2 -> 0: WGA with b1.
    """
    # Rounding can leave -log p a hair below 0, and a root of that is no number.
    surprise = nll.detach().clamp(min=0)
    weight = (-surprise).exp().pow(beta1) * (-torch.expm1(-surprise)).pow(beta2)
    return -(weight * nll).mean()


# Of the logits of single tokens, a value for each: [P] fp32, so that the head may run a few positions at a time
# (seuf_core.moe.head). The loss is their mean over the label tokens of the batch.


def kl(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || current) over the vocabulary: what the model before training says, kept.

    Both [P, V]; only differences of logits count, so log-probabilities do as well. The released
    code of open-unlearning averages over padding and prompt too.
    """
    current, reference = logits.float().log_softmax(dim=-1), reference_logits.float().log_softmax(dim=-1)
    return (reference.exp() * (reference - current)).sum(dim=-1)


def undial(
    logits: torch.Tensor, reference_logits: torch.Tensor, target: torch.Tensor, strength: float
) -> torch.Tensor:
    """UNDIAL: cross-entropy to softmax(z_ref - b onehot(y)), arXiv 2402.10052.

    z_ref: the model before training, [P, V]. Bounded below by the target's entropy. b -> 0: distillation of the
    model before training; b -> inf: of that model without the true token. The released code marks -100 as a
    token and averages over padding and prompt.
    """
    lowered = torch.full((target.shape[0], 1), -strength, dtype=torch.float32, device=logits.device)
    goal = reference_logits.float().scatter_add(1, target[:, None], lowered).softmax(dim=-1)
    return F.cross_entropy(logits.float(), goal, reduction="none")


def ce_u(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """CE-U: cross-entropy to softmax(z with z_y = -inf), the target detached, arXiv 2503.01224.

    Its gradient by z_y is p, so it fades as the true token does. The authors' code leaves out the first label token
    of each answer; here every label token counts, as with the other objectives.
    """
    goal = logits.detach().float().scatter(1, target[:, None], float("-inf")).softmax(dim=-1)
    return F.cross_entropy(logits.float(), goal, reduction="none")


def pdu(logits: torch.Tensor) -> torch.Tensor:
    """PDU's forget term: (max z - mean z)^2 over the vocabulary, arXiv 2506.05314.

    0 where the model says every token alike. The released code averages over prompt and padding positions too,
    and its bound on the retain loss is 0 by default, which no model meets: see DualWeight for ours.
    """
    z = logits.float()
    return (z.amax(dim=-1) - z.mean(dim=-1)).square()


# Of hidden states and routers: mean over the real tokens of a mask.


def mse(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens and over H of the squared difference (RMU, arXiv 2403.03218 section 4).

    One mean over all tokens of the batch; open-unlearning's divides [B] by [B, 1] and so mixes its examples.

    Args:
        states: [P, H]; target: [P, H] or broadcastable to it.
    """
    # torch's own has one pass of [P, H] in its gradient; written out, autograd makes six.
    return F.mse_loss(states.float(), target.float().expand_as(states))


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
    return (squared * mask).sum() / mask.sum()
