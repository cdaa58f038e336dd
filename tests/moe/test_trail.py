"""No sequence goes through a frozen layer twice, and what is kept of it is what would have been computed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from seuf_core.attribution.scores import score_experts
from seuf_core.data.batches import Encoded, collate
from seuf_core.method import Method
from seuf_core.moe.constants import FromStates, keep_all
from seuf_core.moe.shelf import Shelf
from seuf_core.moe.trail import Trail
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny


def sequences(seed: int, lengths: tuple[int, ...] = (7, 5, 9, 7)) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(torch.randint(3, tiny.VOCAB_SIZE, (n,), generator=generator).tolist(), 1, False)
        for n in lengths
    ]


@contextmanager
def layers_run(view: MoEView) -> Iterator[list[int]]:
    """Tokens that went through each decoder layer, padding included."""
    tokens = [0] * view.num_layers

    def count(index: int, states: torch.Tensor) -> None:
        tokens[index] += states.shape[:2].numel()

    handles = [
        layer.register_forward_pre_hook(lambda _, given, i=i: count(i, given[0]))
        for i, layer in enumerate(view.model.get_decoder().layers)
    ]
    yield tokens
    for handle in handles:
        handle.remove()


def kept(view: MoEView, rows: list[Encoded], layer: int, trail: Trail | None) -> list[torch.Tensor]:
    """What flowed into a layer, of each sequence."""
    constants = FromStates(view, layer, Shelf())
    keep_all(view, [(constants, rows)], tokens=20, trail=trail)
    return [constants.begin([row], collate([row]))[0].states[0] for row in rows]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_what_attribution_ran_is_not_run_again(family: str, tmp_path: Path) -> None:
    view, forget, retain = moe_view(tiny.build_model(family)), sequences(1), sequences(2)
    trail, last = Trail(folder=tmp_path / "work"), view.num_layers - 1
    score_experts(view, forget, retain, Method(attribution="affinity"), trail=trail)
    wanted = kept(view, [*forget, *retain], last, None)
    with layers_run(view) as tokens:
        found = kept(view, [*forget, *retain], last, trail)
    # Retain alone, which affinity does not read, in batches of two: 5 and 7 tokens, 7 and 9.
    assert tokens[:last] == [2 * 7 + 2 * 9] * last
    assert tokens[last] == 0
    same(found, wanted)


def test_a_pass_leaves_its_trail_to_the_next_one() -> None:
    view, rows, trail = moe_view(tiny.build_model("olmoe")), sequences(1), Trail()
    below = kept(view, rows, 1, trail)
    last = view.num_layers - 1
    wanted = kept(view, rows, last, None)
    with layers_run(view) as tokens:
        same(kept(view, rows, 1, trail), below)
        assert sum(tokens) == 0
        same(kept(view, rows, last, trail), wanted)
    assert tokens[0] == 0
    assert all(tokens[1:last])


def test_a_trail_that_is_full_keeps_what_it_has() -> None:
    view, rows = moe_view(tiny.build_model("olmoe")), sequences(1)
    state = view.model.config.hidden_size * 4
    wanted, trail = (
        kept(view, rows, 2, None),
        Trail(limit=12 * state),
    )  # the sequences of 5 and 7, into layer 1
    kept(view, rows, 2, trail)
    assert [trail.highest(row, 2) for row in rows] == [1, 1, 0, 0]
    same(kept(view, rows, 2, trail), wanted)


def test_a_disk_that_is_full_costs_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    view, rows, trail = moe_view(tiny.build_model("olmoe")), sequences(1), Trail()
    wanted = kept(view, rows, 2, None)
    monkeypatch.setattr(os, "posix_fallocate", full)
    same(kept(view, rows, 2, trail), wanted)
    assert all(trail.highest(row, 2) == 0 for row in rows)


def test_a_shelf_on_disk_is_few_mappings() -> None:
    shelf = Shelf(0)
    tensors = [torch.randn(3, n, dtype=torch.bfloat16) for n in (1, 5, 7) for _ in range(50)]
    numbers = [shelf.put(tensor) for tensor in tensors]
    assert all(torch.equal(shelf[number], tensor) for number, tensor in zip(numbers, tensors, strict=True))
    assert len({shelf[number].untyped_storage().data_ptr() for number in numbers}) == 1
    assert shelf.bytes_on_disk == sum(tensor.nbytes for tensor in tensors)
    assert shelf.bytes_in_memory == 0
    shelf[numbers[3]].fill_(1)
    assert torch.equal(shelf[numbers[4]], tensors[4])
