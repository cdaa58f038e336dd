"""The plan is torch-free, so that it says again what the code it plans for says; both must say the same."""

from __future__ import annotations

import inspect

from seuf_core import passes
from seuf_core.attribution import scores
from seuf_core.evaluate.probes import score_probes
from seuf_core.moe import constants, forward, head, sweep, trail
from seuf_core.plan import costs


def test_sizes_are_those_of_the_code() -> None:
    assert costs.TOKENS_PER_SCORE == scores.TOKENS_PER_BATCH
    assert costs.TOKENS_PER_BACKWARD == scores.TOKENS_PER_BACKWARD
    assert costs.TOKENS_PER_PASS == constants.TOKENS_PER_PASS
    assert costs.TOKENS_PER_LOOK == forward.TOKENS_PER_LOOK
    assert costs.HEAD_CHUNK == head.CHUNK
    assert costs.STATES_IN_MEMORY == sweep.STATES_IN_MEMORY
    assert costs.CONSTANTS_IN_MEMORY == passes.CONSTANTS_IN_MEMORY
    assert inspect.signature(score_probes).parameters["tokens_per_batch"].default == costs.TOKENS_OF_A_LOOK
    assert costs.TRAIL_BYTES == trail.LIMIT
