"""The rule that chooses a step, fixed before a run and fed with the selection part only.

Among the steps whose retain drop is within the bound, take the one with the lowest forget score; ties within a run go
to the later step, which has forgotten for longer: one look is noisy. Between runs they go to the smaller retain drop,
then to the earlier step. The forget score is floored at chance: answers that are wrong more often than guesses are
knowledge inverted, not knowledge lost, and the rule must not prefer them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from seuf_core.evaluate.probes import EncodedProbe, ProbeScore

# Forget scores (recognised above chance, plus said) at which a run has nothing left to gain, and at which the search
# has. The latter is the demo's bound of .07 above chance less one standard error of 150 probes (.035), since the
# figure that ends the search is the smallest of many looks.
GONE, FORGOTTEN = 0.02, 0.035


@dataclass(frozen=True)
class Quality:
    """Selection figures of one model: how it recognises (choice) and says (open) the two sets, in [0, 1].

    `choice` is the share of right choices; for probes with a single choice, the mean answer probability.
    """

    forget_choice: float
    forget_open: float
    retain_choice: float
    retain_open: float
    chance: float

    @property
    def finite(self) -> bool:
        """Whether the model gave numbers at all: one that says NaN has not forgotten, it is broken."""
        return all(math.isfinite(figure) for figure in astuple(self))

    @property
    def forget_score(self) -> float:
        """Recognised above chance, plus said: 0 is chance and silence."""
        return max(self.forget_choice - self.chance, 0.0) + self.forget_open

    def fell_to(self, level: float, base: Quality) -> bool:
        """Whether the forget score came down to `level`; never for a base that was there before training."""
        return self.forget_score <= level < base.forget_score

    def retain_drop(self, base: Quality) -> float:
        """The worse of the two losses against the model before training; negative when both improved."""
        return max(base.retain_choice - self.retain_choice, base.retain_open - self.retain_open)


@dataclass(frozen=True)
class Look:
    """One evaluation: the step it was made after (0 = before training) and what it showed.

    share: how much of the change since the base was kept in what was evaluated; 1 but in a run that was eased.
    """

    step: int
    quality: Quality
    retain_drop: float
    share: float = 1.0

    def within(self, max_retain_drop: float) -> bool:
        """Whether the retain drop is within the bound."""
        return round(self.retain_drop, 9) <= max_retain_drop

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for events and training checkpoints."""
        own = {"step": self.step, "retain_drop": self.retain_drop, "share": self.share}
        return own | asdict(self.quality)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Look:
        """The inverse of `as_dict`."""
        rest = {name: value for name, value in fields.items() if name not in ("step", "retain_drop", "share")}
        return cls(fields["step"], Quality(**rest), fields["retain_drop"], fields["share"])


def quality_of(probes: Sequence[EncodedProbe], scores: Sequence[ProbeScore]) -> Quality:
    """Collapse probe scores to the figures of the rule; a set without probes counts as 0.

    A set with a probe to which the model gave no number (NaN) has no figures: they are NaN.
    """
    figures: dict[str, float] = {"chance": 0.0}
    for name in ("forget", "retain"):
        members = [i for i, encoded in enumerate(probes) if encoded.probe.set == name]
        single = any(len(probes[i].sequences) == 1 for i in members)
        choice = [scores[i].probability if single else float(scores[i].chose_right) for i in members]
        figures[f"{name}_choice"] = sum(choice) / max(len(members), 1)
        figures[f"{name}_open"] = sum(scores[i].open_right for i in members) / max(len(members), 1)
        if any(math.isnan(scores[i].probability) for i in members):
            figures[f"{name}_choice"] = figures[f"{name}_open"] = math.nan
        if name == "forget" and not single:
            figures["chance"] = sum(1 / len(probes[i].sequences) for i in members) / max(len(members), 1)
    return Quality(**figures)


def order(look: Look) -> tuple[float, float, int]:
    """Sort key among the best looks of several runs: smaller is better."""
    return (round(look.quality.forget_score, 9), round(look.retain_drop, 9), look.step)


def best(looks: Iterable[Look], max_retain_drop: float) -> Look | None:
    """The chosen look, or None when none is within the bound (step 0 always is)."""
    allowed = [look for look in looks if look.within(max_retain_drop)]
    # Of equals the latest, but none instead of the base, which forgot as much without any change.
    return min(allowed, key=lambda look: (order(look)[0], look.step > 0, -look.step), default=None)
