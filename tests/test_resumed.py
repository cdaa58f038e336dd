"""A run that is resumed ends with the weights of one that is not, on a trained model, whose routers really decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seuf_core import Method, reference, unlearn
from seuf_core.errors import Cancelled
from tests.test_pipeline import Recorder

QUICK: dict[str, Any] = {"strength": "fixed", "learning_rate": 3e-3, "batch_size": 16, "steps": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> reference.Reference:
    return reference.build(size="tiny", cache=tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("router", ["train", "freeze"])
def test_a_resumed_run_ends_with_the_same_bits(
    router: str, made: reference.Reference, tmp_path: Path
) -> None:
    """With a trained router, what the constants of a pass remember must not depend on the steps before."""

    def run(name: str, observer: Recorder | None = None) -> None:
        method = Method(**QUICK, preset="paper", router=router, seed=3)
        sets = {"retain": made.retain, "evaluation": made.probes}
        out, work = tmp_path / name, tmp_path / f"work-{name}"
        unlearn(made.model, made.forget, out, method=method, work=work, observer=observer, **sets)

    run("undisturbed")
    with pytest.raises(Cancelled):
        run("resumed", Recorder(stop_after=25))
    run("resumed")
    delta = (tmp_path / "undisturbed" / "delta.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "delta.safetensors").read_bytes() == delta
