"""Objectives over what the model says where a label token is predicted: all but rmu and adaptive_rmu.

Two tables, FORGET_TERMS and RETAIN_TERMS, say what each name computes; two sets beside them say what it needs of
the model before training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch

from seuf_core.errors import MethodError
from seuf_core.method import Method
from seuf_core.moe.forward import Forward
from seuf_core.moe.routing import capture_routing
from seuf_core.unlearning import losses
from seuf_core.unlearning.reference import Reference, Said
from seuf_core.unlearning.terms import Terms, TrainingData, anchor_of

# What is to be forgotten, its alternatives (dpo), the method -> scalar.
ForgetTerm = Callable[[Said, Said, Method], torch.Tensor]
FORGET_TERMS: Final[dict[str, ForgetTerm]] = {
    # SEUF, arXiv 2411.18797
    "gradient_ascent": lambda said, _, __: losses.gradient_ascent(said.nll, said.tokens),
    # arXiv 2203.12817
    "gradient_difference": lambda said, _, __: losses.gradient_ascent(said.nll, said.tokens),
    # arXiv 2404.05868
    "npo": lambda said, _, method: losses.npo(said.nll, said.reference_nll, method.npo_beta),
    # arXiv 2410.07163
    "simnpo": lambda said, _, method: losses.simnpo(
        said.nll, said.tokens, method.simnpo_beta, method.simnpo_margin
    ),
    # arXiv 2305.18290; for unlearning arXiv 2401.06121
    "dpo": lambda said, preferred, method: losses.dpo(
        preferred.nll, preferred.reference_nll, said.nll, said.reference_nll, method.dpo_beta
    ),
    # arXiv 2402.10052
    "undial": lambda said, _, method: said.mean_beside_reference(
        lambda z, z_ref, y: losses.undial(z, z_ref, y, method.undial_strength)
    ),
    # arXiv 2503.01224
    "ce_u": lambda said, _, __: said.mean(losses.ce_u),
    # arXiv 2502.19301
    "wga": lambda said, _, method: losses.wga(said.token_nll, method.wga_beta),
    # arXiv 2505.11953
    "satimp": lambda said, _, method: losses.satimp(said.token_nll, method.satimp_beta1, method.satimp_beta2),
    # arXiv 2506.05314
    "pdu": lambda said, _, __: said.mean(lambda z, _: losses.pdu(z)),
}
RETAIN_TERMS: Final[dict[str, Callable[[Said], torch.Tensor]]] = {
    "cross_entropy": lambda said: losses.cross_entropy(said.nll, said.tokens),
    "kl": lambda said: said.mean_beside_reference(lambda z, z_ref, _: losses.kl(z, z_ref)),
}
# Those that look at the model before training; the others are spared a pass.
USES_REFERENCE_NLL: Final[frozenset[str]] = frozenset({"npo", "dpo"})
USES_REFERENCE_LOGITS: Final[frozenset[str]] = frozenset({"undial", "kl"})


class DualWeight:
    """PDU's weight of the retain loss: lambda <- max(0, lambda + eta (L_r - eps)) after each step, arXiv 2506.05314.

    It begins at `retain_weight`, grows while the retain loss L_r is above its bound eps, and shrinks below it.
    eps is what the base model itself has plus `pdu_slack`. The released code leaves eps to the user, and its
    default 0 is below what any model has, so that lambda only grows.
    """

    def __init__(self, start: float, bound: float, rate: float) -> None:
        self.value, self.bound, self._start, self._rate = start, bound, start, rate

    def update(self, retain_loss: float) -> None:
        """One dual step, with the retain loss of the batch just seen."""
        self.value = max(0.0, self.value + self._rate * (retain_loss - self.bound))

    def state(self) -> dict[str, torch.Tensor]:
        """The weight, for the training checkpoint."""
        # Double, as Python computes: a resumed run must not begin with a rounded weight.
        return {"retain_weight": torch.tensor(self.value, dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`; {} is the beginning."""
        self.value = float(state["retain_weight"]) if state else self._start


class LikelihoodObjective:
    """Forget and retain terms of the tables above, over one pass through the whole model.

    With dpo, the alternatives of the forget rows go through in the same pass. What the model said before training
    is computed in the constructor; for its memory see `Reference`: l of the forget part (npo, dpo), what makes the
    logits of the forget part (undial) or of the retain part (kl).
    """

    def __init__(
        self, forward: Forward, method: Method, data: TrainingData, anchored: dict[int, tuple[int, ...]]
    ) -> None:
        _require_its_data(method, data)
        self._forward, self._method, self._data, self._anchored = forward, method, data, anchored
        uses_nll = method.objective in USES_REFERENCE_NLL
        uses_logits = method.objective in USES_REFERENCE_LOGITS
        keeps_logits = method.retain_loss in USES_REFERENCE_LOGITS
        refer = partial(
            Reference, forward, batch_size=method.batch_size, head_is_trained=method.scope == "full"
        )
        self._forget = refer(data.forget, nll=uses_nll, logits=uses_logits)
        self._alternatives = refer(data.alternatives, nll=method.objective == "dpo")
        self._retain = refer(data.retain, logits=keeps_logits)
        self._dual = self._dual_weight() if method.objective == "pdu" else None

    def _dual_weight(self) -> DualWeight:
        """Its bound: the retain loss of the model as it is, over the label tokens of the training part, + slack."""
        method, retain = self._method, self._data.retain
        base = 0.0  # the base model's divergence from itself
        if method.retain_loss == "cross_entropy":
            summed = Reference(self._forward, retain, method.batch_size, nll=True).nll.double().sum()
            base = float(summed) / sum(len(row.input_ids) - row.labels_from for row in retain)
        return DualWeight(method.retain_weight, base + method.pdu_slack, method.pdu_rate)

    def state(self) -> dict[str, torch.Tensor]:
        """PDU's dual variable; else nothing."""
        return self._dual.state() if self._dual else {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`; {} is the beginning."""
        if self._dual:
            self._dual.load_state(state)

    def halve(self, forget: Sequence[int], retain: Sequence[int]) -> bool:
        """Fewer sequences at once from now on; False at one."""
        return self._forward.halve(self._data.rows(forget, *self._beside(forget, retain)))

    def _beside(self, forget: Sequence[int], retain: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """The retain sequences and the alternatives that a step on these examples runs."""
        kept = retain if self._method.retain_loss in RETAIN_TERMS else []
        return kept, forget if self._method.objective == "dpo" else []

    def __call__(self, forget: Sequence[int], retain: Sequence[int]) -> Terms:
        method, n = self._method, len(forget)
        kept, alternatives = self._beside(forget, retain)
        rows = self._data.rows(forget, kept, alternatives)
        with capture_routing(self._forward.view, tuple(self._anchored), joined=True) as routing:
            answers = self._forward.answers(rows, heard=self._anchored)
        said = self._forget.said(answers, 0, forget)
        preferred = self._alternatives.said(answers, n + len(kept), alternatives)
        forget_term = FORGET_TERMS[method.objective](said, preferred, method)
        retain_term = torch.zeros_like(forget_term)
        if kept:
            retain_term = RETAIN_TERMS[method.retain_loss](self._retain.said(answers, n, kept))
        weight = self._dual.value if self._dual else None
        if self._dual and kept:
            self._dual.update(float(retain_term.detach()))
        pieces, device = self._forward.pieces(rows), answers.states.device
        anchor = anchor_of(routing, self._anchored, pieces, n, device)
        return Terms(forget_term, retain_term, anchor, weight)


def _require_its_data(method: Method, data: TrainingData) -> None:
    if method.objective == "dpo" and len(data.alternatives) != len(data.forget):
        raise MethodError(
            "alternatives_required",
            f"Objective dpo needs one alternative answer for each of {len(data.forget)} forget sequences, "
            f"and has {len(data.alternatives)}.",
            "Encode them with encode_alternatives.",
            "/method/objective",
        )
    if method.objective == "pdu" and not data.retain:
        raise MethodError(
            "retain_set_required",
            "Objective pdu weighs its retain loss while it trains, and no retain set was given.",
            "Give one.",
            "/retain_set",
        )
