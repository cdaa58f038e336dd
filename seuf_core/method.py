"""The method of a job: every choice and hyperparameter, its range and its presets.

Torch-free: the HTTP side embeds `Method` in the job body, the command line builds it from options and the
library takes it as it is, so that a name, a range and a description exist once in the whole project.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from seuf_core.errors import MethodError
from seuf_core.misfits import HIDDEN_STATE_OBJECTIVES as HIDDEN_STATE_OBJECTIVES
from seuf_core.misfits import first_misfit

Scope = Literal["seuf", "random_expert", "top_m", "esft", "lora", "router_only", "experts_only", "full"]
Attribution = Literal["contrast", "affinity", "token_share", "gate_full", "gradient", "random"]
Spread = Literal["one_per_layer", "across_layers", "same_layer"]
RouterMode = Literal["freeze", "train", "project"]
Objective = Literal[
    "gradient_ascent",
    "gradient_difference",
    "npo",
    "simnpo",
    "rmu",
    "adaptive_rmu",
    "dpo",
    "undial",
    "ce_u",
    "wga",
    "satimp",
    "pdu",
]
RetainLoss = Literal["none", "cross_entropy", "kl", "hidden_mse"]

# Scopes that choose experts at all; the others train a part of the model that has no experts in it, or everything.
EXPERT_SCOPES: Final[frozenset[str]] = frozenset(
    {"seuf", "random_expert", "top_m", "esft", "router_only", "experts_only"}
)

# What a preset sets. The fields' own defaults are the preset `default`: the best found on models the project
# trained itself (docs/explanation/method.md). `paper` is arXiv 2411.18797.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "attribution": "affinity",
        "experts": 1,
        "router": "train",
        "objective": "gradient_difference",
        "retain_loss": "cross_entropy",
        "retain_weight": 1.0,
    },
}
# What a scope settles by itself. A field that is given stays; the checks below say whether it can.
_SCOPE_SETTLES: Final[dict[str, dict[str, Any]]] = {
    "top_m": {"spread": "across_layers"},
    "esft": {"attribution": "token_share", "experts": "auto", "router": "freeze"},
    "experts_only": {"router": "freeze"},
    "router_only": {"router": "train"},
    "lora": {"router": "freeze"},
}
# The objectives whose retain term, unless it is given, is another than the preset's.
_RETAIN_LOSS_OF: Final[dict[str, RetainLoss]] = {
    "gradient_ascent": "none",
    "rmu": "hidden_mse",
    "adaptive_rmu": "hidden_mse",
}
# How forms and pages group the fields: a group's first field -> its title; it goes on to the next group's first.
GROUPS: Final[dict[str, str]] = {
    "preset": "Preset",
    "scope": "What is trained",
    "router": "Routers",
    "objective": "Losses",
    "strength": "Strength and steps",
    "splits": "Splits and seed",
}
# What makes a method do without a retain set: field -> value.
_WITHOUT_RETAIN: Final[dict[str, str]] = {
    "retain_loss": "none",
    "attribution": "affinity",
    "router": "train",
}


class Splits(BaseModel):
    """How facts are shared out by a seeded hash: losses see train, the best step is chosen on selection,
    and test is looked at once, at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: float = Field(0.5, gt=0, lt=1, description="Share of facts the losses see.")
    selection: float = Field(0.2, gt=0, lt=1, description="Share of facts that choose the best step.")
    test: float = Field(0.3, gt=0, lt=1, description="Share of facts measured once, at the end.")

    @model_validator(mode="after")
    def _sum_to_one(self) -> Splits:
        if abs(self.train + self.selection + self.test - 1) > 1e-6:
            raise ValueError(
                f"train + selection + test is {self.train + self.selection + self.test:g}; make it 1"
            )
        return self


class Method(BaseModel):
    """A complete, validated method. Fields that are not given are filled from the preset."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"preset": "default"}, {"preset": "paper", "steps": 60}]},
    )

    preset: Literal["default", "paper"] = Field(
        "default", description="Where fields that are not given come from."
    )
    # What is trained
    scope: Scope = Field(
        "seuf",
        description="What is trained. `seuf` = the selected experts and, as `router` says, the routers of their "
        "layers; `random_expert` = as many random experts of the same layers; `top_m` = the `experts` best of the "
        "whole model; `esft` = in every layer the experts that serve the share `esft_share` of the tokens; "
        "`experts_only` and `router_only` = one half of `seuf`; `lora` = low-rank adapters on every linear layer "
        "outside the experts, merged at the end; `full` = everything.",
    )
    attribution: Attribution = Field(
        "contrast",
        description="How experts are scored: `contrast` = affinity on forget minus affinity on retain, "
        "`affinity` = Eq. 2 of the paper, `token_share` = share of the tokens' places (ESFT), `gate_full` = the "
        "router's score whether selected or not, `gradient` = |gradient . weight| of the forget loss, "
        "`random` = seeded.",
    )
    experts: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto",
        description="How many experts are trained; `auto` = the smallest set that covers the forget answers, "
        "grown while the bound is missed.",
    )
    coverage: float = Field(
        0.75,
        gt=0,
        le=1,
        description="With experts = auto: share of forget answer tokens the chosen experts must see at first.",
    )
    max_experts: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto",
        description="With experts = auto: never more than this many; `auto` = half of the model's routed experts.",
    )
    spread: Spread = Field(
        "one_per_layer",
        description="Where several experts lie: `one_per_layer` = the best of each layer before the second best of "
        "any, `across_layers` = the top of the whole model, `same_layer` = the top of the best layer.",
    )
    esft_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Scope esft: share of a layer's token places its chosen experts must hold (p).",
    )
    lora_rank: int = Field(8, ge=1, le=4096, description="Scope lora: rank of the adapters.")
    lora_alpha: float = Field(
        16.0, gt=0, le=1e4, description="Scope lora: the adapters are scaled by this over their rank."
    )
    # Routers
    router: RouterMode = Field(
        "freeze",
        description="`freeze`: routing of the target layers cannot change. `train`: their routers learn too, with the "
        "anchor. `project`: they learn only where retain tokens do not see it (GRIP). Scope `full` trains every "
        "router, without an anchor.",
    )
    anchor_weight: float = Field(
        1.0,
        ge=0,
        le=1e4,
        description="Weight of the router anchor, Eq. 3 (alpha); used when routers are trained.",
    )
    project_energy: float = Field(
        0.99,
        gt=0,
        le=1,
        description="router = project: share of the retain inputs' energy (squared singular values) that an "
        "expert's router row must not see change; 1 = the exact null space of GRIP.",
    )
    # Losses
    objective: Objective = Field("gradient_difference", description="The forget term.")
    retain_loss: RetainLoss = Field(
        "kl", description="The retain term; when it is not given it follows preset and objective."
    )
    retain_weight: float = Field(3.0, ge=0, le=1e4, description="Weight of the retain term (lambda).")
    npo_beta: float = Field(0.1, gt=0, le=100, description="Inverse temperature of NPO (b).")
    simnpo_beta: float = Field(2.5, gt=0, le=100, description="Inverse temperature of SimNPO (b).")
    simnpo_margin: float = Field(0.0, ge=-100, le=100, description="SimNPO's margin (d), nats a token.")
    rmu_coefficient: Literal["auto"] | Annotated[float, Field(gt=0, le=1e6)] = Field(
        "auto",
        description="Length of RMU's random target vector (c), in units of the hidden state; `auto` = "
        "`adaptive_rmu_scale` times the mean norm of the forget hidden states.",
    )
    adaptive_rmu_scale: float = Field(
        5.0,
        gt=0,
        le=1e4,
        description="Adaptive RMU: c = this times the mean norm of the forget hidden states.",
    )
    rmu_layer: Literal["auto"] | Annotated[int, Field(ge=0, le=1000)] = Field(
        "auto",
        description="RMU: the decoder layer whose output is steered; `auto` = the highest target layer.",
    )
    hidden_retain_weight: float = Field(
        1.0, ge=0, le=1e6, description="Weight of the hidden-state retain term of RMU (a)."
    )
    dpo_beta: float = Field(0.1, gt=0, le=100, description="Inverse temperature of DPO (b).")
    dpo_alternative: str = Field(
        "I don't know.",
        min_length=1,
        max_length=1000,
        description="DPO: the preferred answer of examples that bring no `alternative` of their own.",
    )
    undial_strength: float = Field(
        10.0, ge=0, le=1e3, description="UNDIAL: how much the true token's logit is lowered (b)."
    )
    wga_beta: float = Field(
        1.0, ge=0, le=100, description="WGA: weight of a token is its probability to this (b)."
    )
    satimp_beta1: float = Field(5.0, ge=0, le=100, description="SatImp: exponent of p in a token's weight.")
    satimp_beta2: float = Field(
        1.0, ge=0, le=100, description="SatImp: exponent of 1 - p in a token's weight."
    )
    pdu_slack: float = Field(
        0.1,
        ge=0,
        le=100,
        description="PDU: what the retain loss may exceed the base model's by (nats a token) before its weight grows.",
    )
    pdu_rate: float = Field(1.0, gt=0, le=1e3, description="PDU: step of the dual variable (eta).")
    # How strong, how long
    strength: Literal["auto", "fixed"] = Field(
        "auto",
        description="`auto` = rates and step are found by the selection rule. `fixed` = one run of exactly `steps` "
        "steps at the given `learning_rate`, and its last step is the result: a published setting, reproduced.",
    )
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto",
        description="AdamW's constant rate; `auto` tries a short ladder from the same start, strongest first, "
        "until a step has forgotten enough.",
    )
    learning_rate_ladder: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Rates tried by learning_rate = auto; null = in proportion to the trained weights' size.",
    )
    steps: int = Field(200, ge=1, le=100_000, description="Optimiser steps at most.")
    batch_size: int = Field(
        32, ge=1, le=4096, description="Forget examples a step, and as many retain examples."
    )
    max_length: int = Field(
        256,
        ge=8,
        le=32_768,
        description="Tokens of a sequence: a longer running text becomes several, a longer prompt or answer is cut.",
    )
    evaluate_every: int = Field(10, ge=1, le=10_000, description="Steps between looks at the selection part.")
    max_retain_drop: float = Field(
        0.03,
        ge=0,
        le=1,
        description="Bound of the selection rule: what the retain score on the selection part may lose.",
    )
    splits: Splits = Field(
        default_factory=Splits, description="Shares of facts for train, selection and test."
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of the splits, the batch order and every random choice."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """What is not given comes from the preset, then from what scope and objective settle by themselves."""
        if not isinstance(given, dict):
            return given
        filled = {**PRESETS.get(_word(given, "preset", "default"), {}), **given}
        settled = dict(_SCOPE_SETTLES.get(_word(filled, "scope", "seuf"), {}))
        if "retain_loss" not in given:
            objective = _word(filled, "objective", "gradient_difference")
            settled["retain_loss"] = _RETAIN_LOSS_OF.get(objective, filled.get("retain_loss", "kl"))
        return {**filled, **{name: value for name, value in settled.items() if name not in given}}

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Method:
        if (misfit := first_misfit(self)) is not None:
            context = {"problem": misfit.message, "fix": misfit.fix, "fields": misfit.fields}
            raise PydanticCustomError("method_misfit", "{problem} {fix}", context)
        return self

    @property
    def selects_experts(self) -> bool:
        """Whether the scope is one of chosen experts, so that a model without experts cannot have it."""
        return self.scope in EXPERT_SCOPES

    @property
    def trains_router(self) -> bool:
        """Whether routers of the target layers are trained, and so anchored."""
        return self.selects_experts and self.router != "freeze"

    @property
    def needs_retain(self) -> bool:
        """Whether the job cannot run without a retain set."""
        return bool(self.retain_needed_by)

    @property
    def retain_needed_by(self) -> tuple[str, ...]:
        """The fields that cannot do without a retain set; empty when nothing needs one."""
        needs = {
            "retain_loss": self.retain_loss != "none",
            "attribution": self.attribution == "contrast" and self.selects_experts,
            "router": self.router == "project",
        }
        return tuple(field for field, needed in needs.items() if needed)

    def check_retain(self, *, given: bool) -> None:
        """Refuse a method that needs a retain set and has none.

        Raises:
            MethodError: `retain_set_required`.
        """
        if given or not self.needs_retain:
            return
        fields = self.retain_needed_by
        needs = " and ".join(f"{field} {getattr(self, field)}" for field in fields)
        ways_out = [f"{field} {_WITHOUT_RETAIN[field]}" for field in fields]
        without = " and ".join([*(["objective npo"] if self.objective == "pdu" else []), *ways_out])
        raise MethodError(
            "retain_set_required",
            f"The job has no retain set, which {needs} cannot do without.",
            f"Give one, or use {without}.",
            "/retain_set",
        )

    def to_attribute(self) -> Method:
        """The same choice of experts with nothing to train: a retain set is needed only where the score needs it.

        Raises:
            MethodError: `selects_no_expert`.
        """
        if not self.selects_experts:
            raise MethodError(
                "selects_no_expert",
                f"scope {self.scope} selects no expert.",
                "Use scope seuf.",
                "/method/scope",
            )
        return self.model_copy(update={"retain_loss": "none", "router": "freeze"})

    def rates(self, weight_rms: float) -> tuple[float, ...]:
        """The learning rates to try, strongest first.

        Args:
            weight_rms: root mean square of the trained weights. AdamW moves each of them by about its rate a step,
                so a rate only means something beside their size.
        """
        if self.learning_rate != "auto":
            return (self.learning_rate,)
        if self.learning_rate_ladder is not None:
            return tuple(sorted(self.learning_rate_ladder, reverse=True))
        shares = RELATIVE_RATES["full" if self.scope == "full" else "selected"]
        # Two digits: what is shown is what was used.
        return tuple(float(f"{share * weight_rms:.2g}") for share in shares)

    @property
    def rungs(self) -> int:
        """How many rates `rates` gives."""
        return len(self.rates(1.0))


def _word(fields: dict[str, Any], name: str, default: str) -> str:
    """A field that is not validated yet, as something that can be looked up."""
    value = fields.get(name, default)
    return value if isinstance(value, str) else ""


# What one step may move a weight by, as a share of the trained weights' root mean square. A whole model diverges at
# rates one expert needs (docs/explanation/method.md), so it has its own, ten times weaker; equally many, so that
# neither side of a comparison searches harder.
RELATIVE_RATES: Final[dict[str, tuple[float, ...]]] = {"selected": (0.04, 0.0133), "full": (0.004, 0.00133)}
