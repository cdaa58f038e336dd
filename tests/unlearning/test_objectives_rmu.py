"""RMU and adaptive RMU: which layer is steered, to what, and what is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seuf_core.data.batches import Encoded
from seuf_core.errors import MethodError
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import losses
from seuf_core.unlearning.hidden import steered_layer
from tests import tiny
from tests.unlearning.test_objectives import (
    FORGET,
    KEPT,
    PICKED,
    RETAIN,
    TARGETS,
    build,
    close,
    method,
    shaken,
)


@torch.no_grad()
def states(view: MoEView, row: Encoded, layer: int) -> torch.Tensor:
    """Output of a decoder layer [n, H] at the positions that predict a label; the last layer's is not normed."""
    found: list[torch.Tensor] = []
    handle = (
        view.model.get_decoder().layers[layer].register_forward_hook(lambda _, __, out: found.append(out))
    )
    view.model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    return found[0][0, row.labels_from - 1 : len(row.input_ids) - 1]


def mean_square(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    difference = torch.cat([(a - b).reshape(-1, 32) for a, b in pairs])
    return difference.square().mean()


@pytest.mark.parametrize(
    ("name", "fields", "targets", "layer"),
    [
        ("rmu", {}, TARGETS, 1),
        ("rmu", {"rmu_coefficient": 20.0}, TARGETS, 1),
        ("rmu", {"rmu_layer": 2}, TARGETS, 2),
        ("adaptive_rmu", {}, TARGETS, 1),
        ("adaptive_rmu", {"rmu_coefficient": 20.0, "adaptive_rmu_scale": 3.0}, TARGETS, 1),
        ("rmu", {"scope": "full", "rmu_layer": 0}, {}, 0),
        ("adaptive_rmu", {"scope": "full", "rmu_layer": 2}, {}, 2),
    ],
)
def test_hidden_states_are_steered_on_forget_and_held_on_retain(
    name: str, fields: dict[str, Any], targets: dict[int, tuple[int, ...]], layer: int
) -> None:
    """c is given, or the scale (5 unless given) times the mean norm of the states of all forget label positions."""
    view, chosen, terms_of = build(name, targets=targets, hidden_retain_weight=3.0, seed=4, **fields)
    held = [states(view, RETAIN[i], layer) for i in KEPT]
    norms = torch.cat([states(view, row, layer) for row in FORGET]).norm(dim=-1)
    given = name == "rmu" and "rmu_coefficient" in fields
    coefficient = 20.0 if given else chosen.adaptive_rmu_scale * float(norms.mean())
    goal = coefficient * losses.control_vector(32, 4)
    close(terms_of(PICKED, KEPT).retain, 0.0)
    shaken(view)
    terms = terms_of(PICKED, KEPT)
    close(terms.forget, mean_square([(states(view, FORGET[i], layer), goal) for i in PICKED]))
    moved = [states(view, RETAIN[i], layer) for i in KEPT]
    assert float(terms.retain.detach()) > 1e-3
    close(terms.retain, 3.0 * mean_square(list(zip(moved, held, strict=True))))


def test_the_layer_is_the_highest_target_layer_or_the_one_given() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))  # layers 0 to 2
    assert steered_layer(view, method("rmu"), {2: (0,), 0: (1,)}) == 2
    assert steered_layer(view, method("rmu", rmu_layer=1), {1: (0,)}) == 1
    assert steered_layer(view, method("rmu", rmu_layer=0, scope="full"), {}) == 0


@pytest.mark.parametrize(
    ("layer", "targets", "code", "words"),
    [
        (3, TARGETS, "no_such_layer", "0 to 2"),
        (3, {}, "no_such_layer", "0 to 2"),
        (0, TARGETS, "layer_below_targets", "below layer 1"),
    ],
)
def test_a_layer_that_cannot_be_steered_is_named(
    layer: int, targets: dict[int, tuple[int, ...]], code: str, words: str
) -> None:
    with pytest.raises(MethodError, match=words) as caught:
        build("rmu", targets=targets, rmu_layer=layer)
    assert (caught.value.code, caught.value.pointer) == (code, "/method/rmu_layer")
    assert caught.value.fix


@pytest.mark.parametrize("name", ["rmu", "adaptive_rmu"])
def test_the_retain_reference_holds_the_states_that_count_alone(name: str) -> None:
    _, _, terms_of = build(name)
    kept = terms_of._retain_reference  # type: ignore[attr-defined]
    assert [states.shape[0] for states in kept] == [len(row.input_ids) - row.labels_from for row in RETAIN]
    assert all(states.untyped_storage().nbytes() == 4 * states.numel() for states in kept)


def test_no_label_is_an_input_that_counts() -> None:
    """The last token is a label and never predicts one: the states that count do not see it."""
    row = Encoded(list(range(10, 20)), 6, False)
    changed = Encoded([*row.input_ids[:9], 200], 6, False)
    view, _, terms_of = build("rmu", forget=[row, changed], retain=[])
    shaken(view)
    one, other = (float(terms_of([i], []).forget.detach()) for i in (0, 1))
    assert other == pytest.approx(one, rel=1e-5)
