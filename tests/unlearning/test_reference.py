"""What is kept of the model before training: how much, in which form, and that it stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seuf_core.moe.forward import Forward
from seuf_core.moe.head import negative_log_likelihood
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning.reference import Reference
from seuf_core.unlearning.scopes import WholeModelScope
from tests import tiny
from tests.unlearning.test_objectives import FORGET, KEPT, PICKED, RETAIN, build, close, logits_of, shaken

# Hidden size larger than the vocabulary of 259, so that logits are the smaller of the two.
WIDE = {"hidden_size": 288}


def view_of(dtype: torch.dtype = torch.float32, **fields: Any) -> MoEView:
    return moe_view(tiny.build_model("qwen2_moe", **fields).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fields", "head_is_trained", "width"), [({}, False, 32), (WIDE, False, 259), ({}, True, 259)]
)
def test_what_makes_the_logits_takes_the_bytes_it_is_said_to(
    fields: dict[str, Any], head_is_trained: bool, width: int, dtype: torch.dtype
) -> None:
    """P times the smaller of H and V, on the CPU, without padding and not rounded; V where the head will move."""
    forward = Forward(view_of(dtype, **fields))
    reference = Reference(forward, RETAIN, 3, logits=True, head_is_trained=head_is_trained)
    assert [tuple(kept.shape) for kept in reference.kept] == [
        (len(row.input_ids) - row.labels_from, width) for row in RETAIN
    ]
    assert {kept.dtype for kept in reference.kept} == {dtype}
    label_tokens = sum(len(row.input_ids) - row.labels_from for row in RETAIN)
    size = sum(kept.untyped_storage().nbytes() for kept in reference.kept)
    assert size == label_tokens * width * dtype.itemsize


@pytest.mark.parametrize("fields", [{}, WIDE])
def test_the_logits_are_those_before_training(fields: dict[str, Any]) -> None:
    view = view_of(**fields)
    forward = Forward(view)
    reference = Reference(forward, FORGET, 2, nll=True, logits=True)
    expected = torch.cat([logits_of(view, FORGET[i])[0] for i in PICKED]).float()
    shaken(view)
    said = reference.said(forward.answers([RETAIN[0], *(FORGET[i] for i in PICKED)]), 1, PICKED)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(z: torch.Tensor, z_ref: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((z.detach(), z_ref))
        return z.gather(1, target[:, None])[:, 0]

    said.mean_beside_reference(see)
    [(z, z_ref)] = seen
    assert not z_ref.requires_grad
    torch.testing.assert_close(z_ref, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(z, z_ref, rtol=1e-2, atol=1e-2)
    by_hand = negative_log_likelihood(expected, said.answers.target)
    sums = [float(by_hand[said.answers.row == row].sum()) for row in range(3)]
    assert said.reference_nll.tolist() == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize(("name", "retain_loss"), [("undial", "none"), ("npo", "kl")])
def test_a_head_that_is_trained_moves_no_reference(name: str, retain_loss: str) -> None:
    """Scope full: after head and norm have moved, the reference is still what the base said."""
    view, _, terms_of = build(name, retain_loss=retain_loss, scope="full", undial_strength=2.0)
    rows = [FORGET[i] for i in PICKED] if name == "undial" else [RETAIN[i] for i in KEPT]
    before = torch.cat([logits_of(view, row)[0] for row in rows])
    with torch.no_grad():
        view.model.lm_head.weight += 0.3
        view.model.model.norm.weight *= 1.5
    now = torch.cat([logits_of(view, row)[0] for row in rows])
    target = torch.tensor([token for row in rows for token in row.input_ids[row.labels_from :]])
    if name == "undial":
        goal = before.scatter_add(1, target[:, None], torch.full((len(target), 1), -2.0).double()).softmax(-1)
    else:
        goal = before.softmax(-1)
    expected = -(goal * now.log_softmax(-1)).sum(-1).mean()
    if name == "npo":
        expected = expected + (goal * before.log_softmax(-1)).sum(-1).mean()
    found = terms_of(PICKED, KEPT)
    close(found.forget if name == "undial" else found.retain, expected)


def test_a_trained_head_gets_its_gradient_through_every_term() -> None:
    view, chosen, terms_of = build("undial", retain_loss="kl", scope="full")
    shaken(view)
    with WholeModelScope(view).attached():
        terms_of(PICKED, KEPT).total(chosen).backward()
    head, norm = view.model.lm_head.weight.grad, view.model.model.norm.weight.grad
    assert head is not None
    assert norm is not None
    assert float(head.abs().sum()) > 0
    assert float(norm.abs().sum()) > 0


def test_nothing_asked_nothing_kept() -> None:
    reference = Reference(Forward(view_of()), FORGET, 2)
    assert not len(reference.nll)
    assert not reference.kept
