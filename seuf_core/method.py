"""The method of a job: every choice and hyperparameter, its range and its presets.

Torch-free: the HTTP side embeds `Method` in the job body, the command line builds it from options and the
library takes it as it is, so that a name, a range and a description exist once in the whole project.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scope = Literal["seuf", "random_expert", "full"]
Attribution = Literal["contrast", "affinity", "random"]
Spread = Literal["one_per_layer", "across_layers", "same_layer"]
RouterMode = Literal["freeze", "train"]
Objective = Literal["gradient_ascent", "gradient_difference", "npo", "rmu", "adaptive_rmu"]
RetainLoss = Literal["none", "cross_entropy", "hidden_mse"]

HIDDEN_STATE_OBJECTIVES: Final[frozenset[str]] = frozenset({"rmu", "adaptive_rmu"})

# What a preset sets. The fields' own defaults are the preset `default`: the best found on models the project
# trained itself (docs/explanation/method.md). `paper` is arXiv 2411.18797.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "attribution": "affinity",
        "experts": 1,
        "router": "train",
        "objective": "gradient_difference",
    },
}
_RETAIN_LOSS_OF: Final[dict[str, RetainLoss]] = {
    "gradient_ascent": "none",
    "gradient_difference": "cross_entropy",
    "npo": "cross_entropy",
    "rmu": "hidden_mse",
    "adaptive_rmu": "hidden_mse",
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
    scope: Scope = Field(
        "seuf",
        description="What is trained: the selected experts, as many random experts of the same layers, or everything.",
    )
    attribution: Attribution = Field(
        "contrast",
        description="How experts are scored: `contrast` = affinity on forget minus affinity on retain, "
        "`affinity` = Eq. 2 of the paper, `random` = seeded.",
    )
    experts: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto",
        description="How many experts are trained; `auto` = the smallest set that covers the forget answers.",
    )
    coverage: float = Field(
        0.75,
        gt=0,
        le=1,
        description="With experts = auto: share of forget answer tokens the chosen experts must see.",
    )
    max_experts: int = Field(12, ge=1, le=64, description="With experts = auto: never more than this many.")
    spread: Spread = Field(
        "one_per_layer",
        description="Where several experts lie: `one_per_layer` = the best of each layer before the second best of "
        "any, `across_layers` = the top of the whole model, `same_layer` = the top of the best layer.",
    )
    router: RouterMode = Field(
        "freeze",
        description="`freeze`: routing of the target layers cannot change. `train`: their routers learn too, with the "
        "anchor. Scope `full` trains every router, without an anchor.",
    )
    objective: Objective = Field("npo", description="The forget term.")
    retain_loss: RetainLoss = Field(
        "cross_entropy", description="The retain term; when it is not given it follows the objective."
    )
    retain_weight: float = Field(1.0, ge=0, le=1e4, description="Weight of the retain term (lambda).")
    anchor_weight: float = Field(
        1.0, ge=0, le=1e4, description="Weight of the router anchor, Eq. 3 (alpha); used when router = train."
    )
    npo_beta: float = Field(0.1, gt=0, le=100, description="Inverse temperature of NPO (b).")
    rmu_coefficient: float = Field(
        20.0,
        gt=0,
        le=1e6,
        description="Length of RMU's random target vector (c), in units of the hidden state.",
    )
    adaptive_rmu_scale: float = Field(
        5.0,
        gt=0,
        le=1e4,
        description="Adaptive RMU: c = this times the mean norm of the forget hidden states.",
    )
    hidden_retain_weight: float = Field(
        1.0, ge=0, le=1e6, description="Weight of the hidden-state retain term of RMU (a)."
    )
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto",
        description="AdamW's constant rate; `auto` tries `learning_rate_ladder` from the same start, strongest "
        "first, until a step has forgotten enough.",
    )
    learning_rate_ladder: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, min_length=1, max_length=8, description="Rates tried by learning_rate = auto; null = by scope."
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
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(given.get("preset", "default"), {})
        filled = {**preset, **given}
        objective = filled.get("objective")
        if "retain_loss" not in given and isinstance(objective, str) and objective in _RETAIN_LOSS_OF:
            filled["retain_loss"] = _RETAIN_LOSS_OF[objective]
        return filled

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Method:
        hidden = self.objective in HIDDEN_STATE_OBJECTIVES
        if self.retain_loss == "hidden_mse" and not hidden:
            raise ValueError(
                f"retain_loss hidden_mse belongs to rmu and adaptive_rmu, not to {self.objective}; use cross_entropy"
            )
        if self.retain_loss == "cross_entropy" and hidden:
            raise ValueError(
                f"retain_loss cross_entropy does not go with {self.objective}, which runs no output head; "
                "use hidden_mse or none"
            )
        if self.scope == "full" and hidden:
            raise ValueError(f"scope full has no target layer, which {self.objective} needs; use npo")
        return self

    @property
    def needs_retain(self) -> bool:
        """Whether the job cannot run without a retain set."""
        return self.retain_needed_by is not None

    @property
    def retain_needed_by(self) -> str | None:
        """The field that cannot do without a retain set, with its value; None when nothing needs one."""
        if self.retain_loss != "none":
            return f"retain_loss {self.retain_loss}"
        if self.attribution == "contrast" and self.scope != "full":
            return f"attribution {self.attribution}"
        return None

    @property
    def ladder(self) -> tuple[float, ...]:
        """The learning rates to try, strongest first."""
        if self.learning_rate != "auto":
            return (self.learning_rate,)
        if self.learning_rate_ladder is not None:
            return tuple(sorted(self.learning_rate_ladder, reverse=True))
        return LADDERS["full" if self.scope == "full" else "experts"]


# A whole model diverges at rates one expert needs (docs/explanation/method.md): each gets its own ladder, with
# equally many rungs so that neither side of a comparison searches harder.
LADDERS: Final[dict[str, tuple[float, ...]]] = {"experts": (3e-3, 1e-3), "full": (3e-4, 1e-4)}
