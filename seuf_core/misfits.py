"""Which fields of a method cannot be had together: each rule names the fields, what is wrong, and the way out.

Torch-free, as the method is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from seuf_core.method import Method

HIDDEN_STATE_OBJECTIVES: Final[frozenset[str]] = frozenset({"rmu", "adaptive_rmu"})


class Misfit(NamedTuple):
    """Fields that are fine by themselves and cannot be had together; the first is the likeliest mistake."""

    fields: tuple[str, ...]
    message: str  # one sentence
    fix: str


def first_misfit(method: Method) -> Misfit | None:
    """The first rule that the method breaks, or None."""
    for rule in (_losses_misfit, _scope_misfit, _router_misfit, _strength_misfit):
        if (misfit := rule(method)) is not None:
            return misfit
    return None


def _losses_misfit(method: Method) -> Misfit | None:
    hidden, retain = method.objective in HIDDEN_STATE_OBJECTIVES, method.retain_loss
    both = ("retain_loss", "objective")
    if retain == "hidden_mse" and not hidden:
        message = f"retain_loss hidden_mse belongs to rmu and adaptive_rmu, not to {method.objective}."
        return Misfit(both, message, "Use cross_entropy.")
    if hidden and retain in ("cross_entropy", "kl"):
        message = f"retain_loss {retain} does not go with {method.objective}, which runs no output head."
        return Misfit(both, message, "Use hidden_mse or none.")
    if method.objective == "pdu" and retain == "none":
        message = "objective pdu weighs its retain loss while it trains, and retain_loss is none."
        return Misfit(both, message, "Use retain_loss cross_entropy or kl.")
    if hidden and not method.selects_experts and method.rmu_layer == "auto":
        message = f"scope {method.scope} has no target layer, which {method.objective} steers."
        return Misfit(("rmu_layer", "objective", "scope"), message, "Give rmu_layer, or use objective npo.")
    return None


def _scope_misfit(method: Method) -> Misfit | None:
    if method.scope == "top_m" and method.experts == "auto":
        message = "scope top_m takes a given number of experts, and experts is auto."
        return Misfit(("experts", "scope"), message, "Give experts, such as 6, or use scope seuf.")
    if method.scope == "top_m" and method.spread == "one_per_layer":
        message = "scope top_m takes the best experts of the model or of one layer, not one_per_layer."
        return Misfit(("spread", "scope"), message, "Use spread across_layers or same_layer.")
    if method.scope == "esft" and method.experts != "auto":
        message = "scope esft takes as many experts of a layer as esft_share needs, not a given number."
        return Misfit(("experts", "scope"), message, "Leave experts out.")
    if method.scope == "esft" and method.attribution != "token_share":
        message = f"scope esft chooses experts by token_share, not by {method.attribution}."
        return Misfit(("attribution", "scope"), message, "Leave attribution out.")
    return None


def _router_misfit(method: Method) -> Misfit | None:
    fields = ("router", "scope")
    if method.scope == "router_only" and method.router == "freeze":
        return Misfit(
            fields, "scope router_only trains routers and nothing else.", "Use router train or project."
        )
    if method.scope in ("experts_only", "esft", "lora") and method.router != "freeze":
        return Misfit(fields, f"scope {method.scope} trains no router.", "Use router freeze, or scope seuf.")
    if method.scope == "full" and method.router == "project":
        return Misfit(
            fields, "scope full trains every router freely.", "Use router train or freeze, or scope seuf."
        )
    return None


def _strength_misfit(method: Method) -> Misfit | None:
    if method.strength == "fixed" and method.learning_rate == "auto":
        message = "strength fixed searches for nothing, and learning_rate is auto."
        return Misfit(("learning_rate", "strength"), message, "Give learning_rate, such as 1e-4.")
    return None
