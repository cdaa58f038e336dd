"""Memory that runs out in a step: the allocator really fails, and the step ends as if there had been enough."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch

from seuf_core.data.batches import Encoded
from seuf_core.errors import MethodError
from seuf_core.evaluate.probes import score_probes
from seuf_core.moe.forward import Forward
from seuf_core.moe.memory import within_memory
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import loop
from seuf_core.unlearning.loop import Run, train_rung
from seuf_core.unlearning.reference import Reference
from seuf_core.unlearning.scopes import Values
from tests import tiny
from tests.evaluate.test_probes import encode_probes, probe
from tests.unlearning.test_loop import make_run
from tests.unlearning.test_objectives import FORGET

FAR_TOO_MANY = 10**15  # bytes


@contextmanager
def room_for(
    view: MoEView, rows: int, when: Literal["forward", "backward"] = "forward"
) -> Iterator[list[int]]:
    """Inside the block the last decoder layer runs out of memory with more rows than that; collects what it saw."""
    seen: list[int] = []

    def allocate(states: torch.Tensor) -> None:
        seen.append(len(states))
        if len(states) > rows:
            torch.empty(FAR_TOO_MANY, dtype=torch.uint8)

    layer = view.model.get_decoder().layers[-1]
    if when == "forward":
        handle = layer.register_forward_pre_hook(lambda _, inputs: allocate(inputs[0]))
    else:
        # Inside attention: what comes after it runs on label positions, packed.
        handle = layer.self_attn.o_proj.register_full_backward_pre_hook(
            lambda _, outputs: allocate(outputs[0])
        )
    try:
        yield seen
    finally:
        handle.remove()


def view_of(run: Run) -> MoEView:
    view: MoEView = run.objective._forward.view  # type: ignore[attr-defined]
    return view


def step(run: Run) -> tuple[loop.Terms | None, Values]:
    """One step, and the gradients it took."""
    leaves = run.trainable.named_parameters()
    with run.trainable.attached():
        terms = loop.take_step(run, torch.optim.SGD(leaves.values(), lr=1e-3), 0)
    return terms, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("objective", ["npo", "pdu"])
def test_a_step_that_runs_out_of_memory_is_the_same_step(
    objective: str, rows: int, when: Literal["forward", "backward"], tmp_path: Path
) -> None:
    fields = {"objective": objective, "pdu_slack": 0.0, "retain_weight": 1.0}
    enough, _ = make_run(tmp_path / "a", **fields)
    wanted, expected = step(enough)
    scarce, _ = make_run(tmp_path / "b", **fields)
    with room_for(view_of(scarce), rows, when) as seen:
        terms, found = step(scarce)
    assert seen[0] == 4  # two forget and two retain sequences, which were too many
    assert seen[-1] <= rows
    assert terms is not None
    assert wanted is not None
    torch.testing.assert_close(terms.forget, wanted.forget, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.retain, wanted.retain, rtol=1e-6, atol=1e-6)
    assert terms.retain_weight == wanted.retain_weight
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 2e-6 * float(gradient.norm())
    # One dual step, however often the pass was begun.
    for name, value in enough.objective.state().items():
        torch.testing.assert_close(scarce.objective.state()[name], value, rtol=1e-6, atol=0)


def test_memory_that_has_run_out_once_is_not_asked_for_again(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, steps=3)
    with room_for(view_of(run), 2) as seen:
        train_rung(run, 0, 1e-3)
    assert seen.count(4) == 1


def test_one_sequence_that_does_not_fit_is_an_error_that_says_so(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, max_length=64)
    with room_for(view_of(run), 0), pytest.raises(MethodError, match="up to 64 tokens") as caught:
        train_rung(run, 0, 1e-3)
    assert caught.value.code == "out_of_memory"
    assert caught.value.pointer == "/method/max_length"
    assert step(run)[0] is not None  # and the model is whole


def test_another_error_is_passed_on(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    view_of(run).model.get_decoder().layers[-1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_rung(run, 0, 1e-3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_the_errors_of_other_allocators_count_too(error: Exception) -> None:
    left = [error]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert within_memory(work, lambda: True, 8) == "done"


def test_references_and_probes_fit_too() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    probes = encode_probes(tiny.build_tokenizer(), [probe(i, (" a", " bcd"), i % 2) for i in range(3)], 64)
    wanted, scores = Reference(Forward(view), FORGET, 5, nll=True).nll, score_probes(Forward(view), probes)
    with room_for(view, 2) as seen:
        found = Reference(Forward(view), FORGET, 5, nll=True).nll
        again = score_probes(Forward(view), probes)
    assert max(seen) > 2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert [score.probability for score in again] == pytest.approx(
        [score.probability for score in scores], rel=1e-4
    )


def test_what_a_failed_pass_held_is_free_before_the_next_one() -> None:
    alive: list[bool] = []

    class Watched:
        pass

    references: list[weakref.ref[Watched]] = []

    def work() -> int:
        alive.extend(reference() is not None for reference in references)
        kept = Watched()
        references.append(weakref.ref(kept))
        if len(references) < 3:
            torch.empty(FAR_TOO_MANY, dtype=torch.uint8)
        return len(references)

    assert within_memory(work, lambda: True, 8) == 3
    assert alive == [False] * 3


def test_halving_goes_down_to_single_sequences() -> None:
    forward = Forward(moe_view(tiny.build_model("qwen2_moe")))
    rows = [Encoded([5, 6, 7, 8], 2, False)] * 4
    counts = [len(forward.pieces(rows))]
    while forward.halve(rows):
        counts.append(len(forward.pieces(rows)))
    assert counts == [1, 2, 4]
