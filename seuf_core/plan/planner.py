"""The plan of a job: which weights are in memory when, on which device, and what each phase reads, holds and takes.

Torch-free arithmetic over seuf_core.plan.facts by the formulas of seuf_core.plan.costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from seuf_core.method import Method
from seuf_core.plan import phases
from seuf_core.plan.facts import Calibration, JobTokens, Machine, ModelShape
from seuf_core.plan.machine import choose_device, gigabytes
from seuf_core.plan.phases import Draft
from seuf_core.plan.setting import Residency, Setting, Targets, worst_targets

# The largest first: what is in memory need not be read again.
RESIDENCIES: Final[tuple[Residency, ...]] = ("whole", "suffix", "streamed")


@dataclass(frozen=True)
class Phase:
    """One phase as planned.

    bytes_read, bytes_written: on disk. flops: floating-point operations. seconds: None without a calibration.
    memory: what is in memory at its peak, bytes by what they are for; together `peak_bytes`, anonymous memory of the
    process (on an accelerator, all but `process` and `constants` are there).
    """

    name: str
    bytes_read: int
    bytes_written: int
    flops: int
    seconds: float | None
    memory: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Of everything in `memory`."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What a job will read, hold, compute and write.

    device, residency: with the reason beside each. `whole` = all layers stay in memory; `suffix` = attribution reads
    one layer after the other, then those from `lowest_layer` on stay; `streamed` = only target layers stay, the
    others are read anew in every pass. fits: whether the peak is within `budget_bytes`.
    micro_batch_tokens: padded tokens that go through at once while training; a step of more runs in pieces.
    lowest_layer: of the targets, None where no expert is chosen; bound: whether it is the worst case, because which
    experts are chosen is not known yet; experts: how many are taken as trained.
    seconds: of one run at one rate; seconds_all: of every rate that may be tried on one selection (a selection that
    grows begins anew). None without a calibration, and `seconds_missing` says why.
    """

    device: str
    device_why: str
    residency: Residency
    residency_why: str
    fits: bool
    budget_bytes: int
    budget_why: str
    micro_batch_tokens: int
    lowest_layer: int | None
    bound: bool
    experts: int
    phases: tuple[Phase, ...]
    runs: int
    seconds: float | None
    seconds_all: float | None
    seconds_missing: str | None
    tokens_counted: str
    calibration: Calibration | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """Of the phase that holds most."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def bytes_read(self) -> int:
        """Of all phases, one run."""
        return sum(phase.bytes_read for phase in self.phases)

    @property
    def bytes_written(self) -> int:
        """Of all phases, one run."""
        return sum(phase.bytes_written for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Peak on the host: everything on a CPU, else the process and its constants."""
        if self.device == "cpu":
            return self.peak_bytes
        return max(sum(p.memory.get(part, 0) for part in phases.ON_HOST) for p in self.phases)

    @property
    def device_bytes(self) -> int:
        """Peak on the accelerator; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        return max(
            sum(size for part, size in p.memory.items() if part not in phases.ON_HOST) for p in self.phases
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, totals included."""
        shown = asdict(self)
        for phase, own in zip(shown["phases"], self.phases, strict=True):
            phase["peak_bytes"] = own.peak_bytes
        totals = ("peak_bytes", "host_bytes", "device_bytes", "bytes_read", "bytes_written")
        return shown | {name: getattr(self, name) for name in totals}


def make_plan(
    shape: ModelShape,
    tokens: JobTokens,
    method: Method,
    machine: Machine,
    *,
    calibration: Calibration | None = None,
    targets: Targets | None = None,
    missing: str = "Nothing was calibrated.",
    among: Sequence[Residency] = RESIDENCIES,
) -> Plan:
    """Plan a job.

    Args:
        shape: see `seuf_core.plan.facts.model_shape`. tokens: of the sets after splitting.
        machine: memory and devices that may be used.
        calibration: without one no phase has seconds, for the reason `missing`.
        targets: what is trained, once it is known; None = the worst case that the method allows.
        among: the residencies that may still be had, the first that fits is taken.
    """
    chosen = targets or worst_targets(shape, method)
    device = choose_device(shape, machine)
    budget = device.memory
    cached = machine.cache is None or shape.bytes <= machine.cache
    setting = Setting(shape, tokens, method, chosen, calibration, cached=cached)
    allowed = tuple(name for name in among if name in _allowed(method))
    residency, micro, drafts = _first_that_fits(setting, budget, allowed)
    peak = max(draft.peak for draft in drafts)
    planned = tuple(_phase(draft, calibration) for draft in drafts)
    seconds = _total(planned)
    training = [phase.seconds for phase in planned if phase.name in phases.REPEATED]
    runs = 1 if method.strength == "fixed" else method.rungs
    again = (runs - 1) * sum(part or 0.0 for part in training)
    return Plan(
        device=device.name,
        device_why=device.why,
        residency=residency,
        residency_why=_why(setting, allowed, drafts, residency, budget),
        fits=peak <= budget,
        budget_bytes=budget,
        budget_why=device.limit,
        micro_batch_tokens=micro,
        lowest_layer=chosen.layers[0] if chosen.layers else None,
        bound=targets is None and chosen.guessed,
        experts=chosen.experts,
        phases=planned,
        runs=runs,
        seconds=seconds,
        seconds_all=None if seconds is None else seconds + again,
        seconds_missing=None if calibration else missing,
        tokens_counted=tokens.counted,
        calibration=calibration,
        notes=_notes(setting, targets),
    )


def _first_that_fits(
    setting: Setting, budget: int, allowed: Sequence[Residency]
) -> tuple[Residency, int, tuple[Draft, ...]]:
    """The first residency whose peak is within the budget, with the largest micro-batch; else the smallest there is.

    A smaller micro-batch costs one more forward pass, and is taken before layers are read anew in every step.
    """
    least: tuple[Residency, int, tuple[Draft, ...]] | None = None
    for residency in allowed:
        for micro in _micro_batches(setting):
            made = phases.drafts(replace(setting, residency=residency, micro=micro))
            peak = max(draft.peak for draft in made)
            if peak <= budget:
                return residency, micro, made
            if least is None or peak < max(draft.peak for draft in least[2]):
                least = residency, micro, made
    assert least is not None  # every scope allows `whole`
    return least


def _allowed(method: Method) -> tuple[Residency, ...]:
    """A whole model cannot be trained in parts, nor can adapters in all of its layers."""
    return RESIDENCIES if method.selects_experts else RESIDENCIES[:1]


def _micro_batches(setting: Setting) -> Iterator[int]:
    """Padded tokens of a step at once: all, then half as many, down to the longest sequence."""
    batch = setting.batch
    size = max(1, batch.tokens)
    while True:
        yield size
        if size // 2 < max(1, batch.longest):
            return
        size //= 2


def _phase(draft: Draft, calibration: Calibration | None) -> Phase:
    work = draft.work
    seconds = round(work.seconds(calibration), 3) if calibration else None
    return Phase(draft.name, work.bytes_read, work.bytes_written, work.all_flops, seconds, draft.memory)


def _total(planned: tuple[Phase, ...]) -> float | None:
    known = [phase.seconds for phase in planned if phase.seconds is not None]
    return round(sum(known), 3) if len(known) == len(planned) else None


def _why(
    setting: Setting,
    allowed: Sequence[Residency],
    drafts: tuple[Draft, ...],
    residency: Residency,
    budget: int,
) -> str:
    """One sentence: what was refused and what is taken."""
    peak = max(draft.peak for draft in drafts)
    if not setting.method.selects_experts:
        only = f"scope {setting.method.scope} trains in all layers, which so stay in memory"
        missing = f"that needs {gigabytes(peak)} and {gigabytes(budget)} are there"
        return only if peak <= budget else f"{only}; {missing}"
    smallest = min(_micro_batches(setting))
    refused = [
        f"{name} needs {gigabytes(_peak(replace(setting, residency=name, micro=smallest)))}"
        for name in allowed[: allowed.index(residency)]
    ]
    taken = f"{residency} needs {gigabytes(peak)} of {gigabytes(budget)}"
    if peak > budget:
        return f"{taken}, which is too much, and no other way needs less"
    return ", ".join([*refused, taken])


def _peak(setting: Setting) -> int:
    return max(draft.peak for draft in phases.drafts(setting))


def _notes(setting: Setting, targets: Targets | None) -> tuple[str, ...]:
    method, chosen = setting.method, setting.targets
    notes = []
    if targets is None and chosen.guessed:
        notes.append(
            f"Which experts are trained is not known before attribution: {chosen.experts} from layer "
            f"{chosen.layers[0]} on are taken, so layers and states are a bound."
        )
    if targets is None and chosen.guessed and method.experts == "auto":
        notes.append("A selection that grows trains again, with more experts; that is not in these figures.")
    if method.strength == "auto":
        notes.append("A run that ends early or is the last one needed takes less.")
    if setting.tokens.counted != "tokenizer":
        notes.append("Tokens were not counted but taken as a quarter of the texts' bytes.")
    return tuple(notes)
