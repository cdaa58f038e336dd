"""Where a job's passes begin and which layers they find in memory, once it is known what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from seuf_core.evaluate.probes import sequences_of
from seuf_core.job import Job
from seuf_core.moe.constants import FromStates, FrozenRouter, TrainedRouter, keep_all
from seuf_core.moe.forward import TOKENS_PER_LOOK, Forward
from seuf_core.moe.shelf import Shelf

# Bytes of constants that are kept in memory; more of them are a mapped file.
CONSTANTS_IN_MEMORY: Final = 1 << 30

Targets = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Passes:
    """How the training parts go through the model, and how the probes of the selection part do."""

    training: Forward
    looks: Forward


def open_passes(job: Job, targets: Targets, work: Path) -> Passes:
    """Keep what is constant while these experts (or their routers) are trained; the model must be the base.

    Args:
        targets: decoder layer -> experts; {} for a scope without any, whose passes begin with the tokens.
        work: folder for what does not fit into memory.
    """
    view, method, micro = job.view, job.method, job.micro_batch_tokens
    job.hold_for(targets)
    recompute = job.residency == "streamed"
    if not targets or view.family.carries is not None:
        return Passes(Forward(view, tokens=micro, recompute=recompute), Forward(view, tokens=TOKENS_PER_LOOK))
    shelf = Shelf(CONSTANTS_IN_MEMORY, work)
    examples = [*job.data.forget, *job.data.retain, *job.data.alternatives]
    probes = sequences_of(job.selection_probes)
    training: FrozenRouter | TrainedRouter
    looks: FrozenRouter | FromStates
    if method.trains_router:
        # Probes have many more tokens than are trained on: what each expert says to them would be too much to keep.
        training, looks = TrainedRouter(view, targets, shelf), FromStates(view, min(targets), shelf)
    else:
        training = looks = FrozenRouter(view, targets, shelf)
    keep_all(view, [(training, examples), (looks, probes)], folder=work, trail=job.trail)
    return Passes(
        Forward(view, training, tokens=micro, recompute=recompute),
        Forward(view, looks, tokens=TOKENS_PER_LOOK),
    )


def open_test_pass(job: Job, targets: Targets, work: Path) -> Forward:
    """How the probes of the test part go through the model, whatever is done to these experts and their routers."""
    job.hold_for(targets)
    if not targets or job.view.family.carries is not None:
        return Forward(job.view, tokens=TOKENS_PER_LOOK)
    constants = FromStates(job.view, min(targets), Shelf(CONSTANTS_IN_MEMORY, work))
    keep_all(job.view, [(constants, sequences_of(job.test_probes))], folder=work)
    return Forward(job.view, constants, tokens=TOKENS_PER_LOOK)
