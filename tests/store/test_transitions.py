"""The table of transitions, pair by pair, against a list written down a second time by hand."""

from itertools import product

import pytest

from store.errors import TransitionRefusedError
from store.transitions import FINAL, HELD, TRANSITIONS, Status, allowed, check, sources

ARROWS = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "cancelling"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "rejected"),
    ("cancelling", "cancelled"),
    ("cancelling", "succeeded"),
    ("cancelling", "failed"),
    ("cancelling", "rejected"),
}


@pytest.mark.parametrize(("before", "after"), list(product(Status, Status)))
def test_every_pair(before: Status, after: Status) -> None:
    expected = (before.value, after.value) in ARROWS
    assert allowed(before, after) is expected
    assert (before in sources(after)) is expected
    if expected:
        check("job_x", before, after)
    else:
        with pytest.raises(TransitionRefusedError) as refused:
            check("job_x", before, after)
        assert "job_x" in refused.value.message
        assert before in refused.value.message
        assert refused.value.code == "transition_refused"


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert {status.value for status in FINAL} == {"cancelled", "succeeded", "failed", "rejected"}
    assert {status.value for status in HELD} == {"running", "cancelling"}
