"""Which layers are in memory when: on modules of one number each, whose reads are written down."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from seuf_core.moe.weights import Resident, Streamed


class Layers:
    """Four layers on the meta device; `read` gives layer i the weight i and a buffer -i, and may be made to wait."""

    def __init__(self, *, prefetch: bool = True) -> None:
        self.modules = [nn.Linear(1, 1, bias=False, device="meta") for _ in range(4)]
        for module in self.modules:
            module.register_buffer("seen", torch.empty(1, device="meta"))
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.fails: set[int] = set()
        self.weights = Streamed(self.modules, self._read, prefetch=prefetch)

    def _read(self, layer: int) -> dict[str, torch.Tensor]:
        self.read.append(layer)
        self.threads.add(threading.current_thread().name)
        if layer in self.fails:
            raise OSError(f"layer {layer}")
        return {"weight": torch.full((1, 1), float(layer)), "seen": torch.full((1,), -float(layer))}

    @property
    def there(self) -> list[int]:
        found = [not module.weight.is_meta for module in self.modules]
        assert found == [not module.seen.is_meta for module in self.modules]
        return [i for i, there in enumerate(found) if there]

    def settle(self, reads: int) -> None:
        """Until the other thread has read this often in all."""
        for _ in range(200):
            if len(self.read) >= reads:
                return
            time.sleep(0.005)
        raise AssertionError(f"read {self.read}, and no more")


def test_a_block_has_its_weights_and_the_last_one_stays_until_another_is_taken() -> None:
    layers = Layers()
    assert layers.there == []
    with layers.weights.loaded(2):
        assert layers.there == [2]
        assert (layers.modules[2].weight.item(), layers.modules[2].seen.item()) == (2, -2)
        assert isinstance(layers.modules[2].weight, nn.Parameter)
    assert layers.there == [2]
    with layers.weights.loaded(2):
        assert layers.read == [2]
    with layers.weights.loaded(0):
        assert layers.there == [0]
    layers.weights.hold(())
    assert layers.there == []


def test_blocks_nest_of_the_same_layer_and_of_others() -> None:
    layers = Layers()
    with layers.weights.loaded(1):
        with layers.weights.loaded(1), layers.weights.loaded(3):
            assert layers.there == [1, 3]
        assert 1 in layers.there
        with layers.weights.loaded(0):
            assert layers.there == [0, 1]
    assert layers.there == [1]
    assert layers.read == [1, 3, 0]


def test_an_error_inside_a_block_leaves_it() -> None:
    layers = Layers()
    with pytest.raises(ValueError, match="stop"), layers.weights.loaded(1):
        raise ValueError("stop")
    layers.weights.hold(())
    assert layers.there == []


@pytest.mark.parametrize("order", [range(4), reversed(range(4)), [3, 1, 2]])
def test_each_reads_every_layer_once_and_the_next_one_meanwhile(order: Iterator[int]) -> None:
    layers, wanted, out = Layers(), [], []
    order = list(order)  # type: ignore[assignment]
    for at, layer in enumerate(layers.weights.each(order)):
        out.append(layer)
        assert layers.there == [layer]
        layers.settle(min(at + 2, len(order)))  # type: ignore[arg-type]
        wanted.append(layers.modules[layer].weight.item())
    assert out == wanted == layers.read == order
    assert len(layers.threads) == 2  # the first by ourselves, the others by the other one


def test_without_prefetch_nothing_is_read_before_its_turn() -> None:
    layers = Layers(prefetch=False)
    for at, _ in enumerate(layers.weights.each(range(4))):
        assert layers.read == list(range(at + 1))
    assert layers.threads == {threading.current_thread().name}


def test_each_that_is_left_early_gives_up_what_it_read_ahead() -> None:
    layers = Layers()
    walk = layers.weights.each(range(4))
    next(walk)
    layers.settle(2)
    walk.close()
    layers.weights.hold(())
    assert layers.there == []
    with layers.weights.loaded(1):
        assert layers.read == [0, 1, 1]


def test_a_way_back_begins_with_the_last_layer_and_reads_ahead_downwards_as_far_as_the_way_there() -> None:
    layers = Layers()
    for _ in layers.weights.each(range(1, 4)):
        pass
    assert layers.read == [1, 2, 3]
    for layer in (3, 3, 2, 2, 1, 1):  # two pieces each, as a backward pass asks for them
        with layers.weights.loaded(layer):
            assert layers.modules[layer].weight.item() == layer
            if layer == 2:
                layers.settle(5)
                assert layers.read == [1, 2, 3, 2, 1]
    assert layers.read == [1, 2, 3, 2, 1]  # layer 0 was no part of the way there


def test_held_layers_stay_and_are_not_read_again() -> None:
    layers = Layers()
    layers.weights.hold([1, 3])
    assert layers.there == [1, 3]
    kept = layers.modules[1].weight
    for layer in layers.weights.each(range(4)):
        assert {1, 3} <= set(layers.there) <= {1, 3, layer}
    assert layers.read == [1, 3, 0, 2]
    assert layers.modules[1].weight is kept
    layers.weights.hold([1])
    assert layers.there == [1]
    assert layers.modules[1].weight is kept


def test_whether_a_gradient_is_wanted_outlasts_the_weights() -> None:
    layers = Layers()
    layers.modules[1].requires_grad_(False)
    with layers.weights.loaded(1):
        assert not layers.modules[1].weight.requires_grad
        layers.modules[1].requires_grad_(True)
    layers.weights.hold(())
    assert layers.modules[1].weight.requires_grad
    with layers.weights.loaded(1):
        assert layers.modules[1].weight.requires_grad


def test_a_read_that_fails_says_so_where_the_layer_is_taken_and_can_be_tried_again() -> None:
    layers = Layers()
    layers.fails = {1}
    walk = layers.weights.each(range(3))
    assert next(walk) == 0
    with pytest.raises(OSError, match="layer 1"):
        next(walk)
    assert layers.there == []
    layers.fails = set()
    assert list(layers.weights.each(range(3))) == [0, 1, 2]


def test_a_resident_model_has_no_work() -> None:
    weights = Resident()
    weights.hold([1])
    weights.ahead(2)
    with weights.loaded(0):
        assert list(weights.each([2, 0])) == [2, 0]


def test_of_no_layers_each_gives_none() -> None:
    layers = Layers()
    assert list(layers.weights.each(range(2, 2))) == []
    assert layers.read == []
