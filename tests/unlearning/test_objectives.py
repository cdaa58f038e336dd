"""The loss of one step, put together by hand: which rows, which positions, which reference.

The oracle runs every example alone and unpadded through the model's ordinary forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seuf_core.data.batches import Encoded
from seuf_core.method import Method
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import losses
from seuf_core.unlearning.objectives import Objective, TrainingData, build_objective
from seuf_core.unlearning.scopes import ExpertScope
from tests import tiny

TARGETS = {0: (1, 2), 1: (3,)}  # the highest target layer is not the last of the model


def rows(lengths: tuple[int, ...], seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(torch.randint(3, 259, (n,), generator=generator).tolist(), max(1, n // 2), False)
        for n in lengths
    ]


FORGET, RETAIN = rows((4, 11, 7, 9, 5), 1), rows((6, 13, 3, 8), 2)
PICKED, KEPT = [3, 0, 1], [2, 1]


def method(objective: str, **fields: Any) -> Method:
    return Method(objective=objective, batch_size=2, **fields)  # type: ignore[arg-type]


def build(
    objective: str, forget: list[Encoded] = FORGET, retain: list[Encoded] = RETAIN, **fields: Any
) -> tuple[MoEView, Method, Objective]:
    view = moe_view(tiny.build_model("qwen2_moe"))
    chosen = method(objective, **fields)
    return view, chosen, build_objective(view, chosen, TrainingData(forget, retain), TARGETS)


def shaken(view: MoEView) -> MoEView:
    """The same model after some training: its target layers have moved."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in TARGETS:
            for weight in (view.layer(layer).experts.down_proj, view.layer(layer).router.weight):
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return view


@torch.no_grad()
def likelihood(view: MoEView, row: Encoded) -> tuple[torch.Tensor, int]:
    """(l, number of labels) of one example: token t is predicted by the logits of t - 1."""
    log_probs = view.model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    at = range(row.labels_from, len(row.input_ids))
    return -sum((log_probs[t - 1, row.input_ids[t]] for t in at), torch.zeros(())), len(at)


@torch.no_grad()
def states(view: MoEView, row: Encoded) -> torch.Tensor:
    """Output of layer 1 [P, H] at the positions that predict a label."""
    hidden = view.model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[2]
    return hidden[0, row.labels_from - 1 : len(row.input_ids) - 1]


def mean_square(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    difference = torch.cat([(a - b).reshape(-1, 32) for a, b in pairs])
    return difference.square().mean()


def close(found: torch.Tensor, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["gradient_ascent", "gradient_difference"])
def test_ascent_and_retain_cross_entropy_by_hand(objective: str) -> None:
    view, chosen, terms_of = build(objective, retain_loss="cross_entropy")
    shaken(view)
    terms = terms_of(PICKED, KEPT)
    forget = [likelihood(view, FORGET[i]) for i in PICKED]
    retain = [likelihood(view, RETAIN[i]) for i in KEPT]
    close(terms.forget, -sum(nll / n for nll, n in forget) / 3)
    close(terms.retain, sum(nll for nll, _ in retain) / sum(n for _, n in retain))
    close(terms.anchor, 0.0)
    close(terms.total(chosen), terms.forget.detach() + terms.retain.detach())


def test_npo_refers_to_the_same_example_under_the_model_before_training() -> None:
    view, _, terms_of = build("npo", npo_beta=0.3)
    before = [likelihood(view, FORGET[i])[0] for i in PICKED]
    shaken(view)
    after = [likelihood(view, FORGET[i])[0] for i in PICKED]
    odds = [0.3 * (now - then) for now, then in zip(after, before, strict=True)]
    assert max(abs(float(o)) for o in odds) > 0.1
    close(
        terms_of(PICKED, KEPT).forget,
        sum((2 / 0.3) * torch.nn.functional.softplus(-o) for o in odds) / 3,
    )


@pytest.mark.parametrize("objective", ["rmu", "adaptive_rmu"])
def test_hidden_states_are_steered_on_forget_and_held_on_retain(objective: str) -> None:
    view, chosen, terms_of = build(objective, hidden_retain_weight=3.0, seed=4)
    held = [states(view, RETAIN[i]) for i in KEPT]
    norms = torch.cat([states(view, row) for row in FORGET]).norm(dim=-1)
    coefficient = chosen.rmu_coefficient if objective == "rmu" else 5.0 * float(norms.mean())
    goal = coefficient * losses.control_vector(32, 4)
    close(terms_of(PICKED, KEPT).retain, 0.0)
    shaken(view)
    terms = terms_of(PICKED, KEPT)
    close(terms.forget, mean_square([(states(view, FORGET[i]), goal) for i in PICKED]))
    moved = [states(view, RETAIN[i]) for i in KEPT]
    assert float(terms.retain.detach()) > 1e-3
    close(terms.retain, 3.0 * mean_square(list(zip(moved, held, strict=True))))


@pytest.mark.parametrize("objective", ["gradient_difference", "npo", "rmu", "adaptive_rmu"])
def test_the_anchor_sees_every_real_forget_token_of_every_target_layer(objective: str) -> None:
    """With every objective; prompt tokens count, padding and retain rows do not."""
    view, chosen, terms_of = build(objective, router="train", anchor_weight=7.0)
    expected = torch.zeros(())
    for layer, experts in TARGETS.items():
        distances = []
        for i in PICKED:
            inputs: list[torch.Tensor] = []
            router = view.layer(layer).router
            handle = router.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            with torch.no_grad():
                view.model(input_ids=torch.tensor([FORGET[i].input_ids]))
            handle.remove()
            s = torch.softmax(inputs[0].reshape(-1, 32) @ router.weight.detach().T, dim=-1)
            a = torch.zeros(8)
            a[list(experts)] = 1 / len(experts)
            distances.append((s - a).square().sum(-1))
        expected = expected + torch.cat(distances).mean()
    terms = terms_of(PICKED, KEPT)
    close(terms.anchor, expected)
    close(terms.total(chosen), (terms.forget + terms.retain).detach() + 7 * expected)


@pytest.mark.parametrize("objective", ["gradient_difference", "npo", "rmu", "adaptive_rmu"])
def test_without_a_weight_the_retain_rows_do_not_move_anything(objective: str) -> None:
    def gradients(kept: list[int], weight: float) -> dict[str, torch.Tensor]:
        view, chosen, terms_of = build(objective, retain_weight=weight)
        scope = ExpertScope(view, TARGETS, train_router=False)
        shaken(view)  # else the hidden retain term is 0 and has no gradient to leave out
        with scope.attached():
            terms_of(PICKED, kept).total(chosen).backward()
        return {n: p.grad for n, p in scope.named_parameters().items() if p.grad is not None}

    without, weightless, weighty = gradients([], 1.0), gradients(KEPT, 0.0), gradients(KEPT, 1.0)
    assert without
    for name, gradient in without.items():
        torch.testing.assert_close(weightless[name], gradient, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(weighty[n], g, rtol=1e-2, atol=1e-4) for n, g in without.items())


@pytest.mark.parametrize("objective", ["gradient_difference", "npo", "rmu", "adaptive_rmu"])
def test_padding_changes_no_term(objective: str) -> None:
    """A very long retain example in the batch pads every other row: their terms stay."""
    long = rows((60,), 5)
    _, _, terms_of = build(objective, retain=[*RETAIN, *long], router="train")
    short, padded = terms_of(PICKED, KEPT), terms_of(PICKED, [*KEPT, len(RETAIN)])
    close(padded.forget, short.forget.detach())
    close(padded.anchor, short.anchor.detach())
    alone = terms_of([0], [2])
    beside = terms_of([0, 1], [2])  # 11 tokens beside 4 and 3
    close(beside.retain, alone.retain.detach())


@pytest.mark.parametrize("objective", ["gradient_ascent", "npo", "rmu"])
def test_no_label_is_a_prompt_token(objective: str) -> None:
    """The logits and states that count are those before a label: a causal model's first part does not see it."""
    row = Encoded(list(range(10, 20)), 6, False)
    changed = Encoded([*row.input_ids[:9], 200], 6, False)  # the last token is a label and never an input that counts
    view, _, terms_of = build(objective, forget=[row, changed], retain=[])
    shaken(view)
    one, other = (float(terms_of([i], []).forget.detach()) for i in (0, 1))
    if objective == "rmu":
        assert other == pytest.approx(one, rel=1e-5)
    else:
        assert other != pytest.approx(one, rel=1e-3)
        expected = [likelihood(view, r) for r in (row, changed)]
        assert [n for _, n in expected] == [4, 4]


@pytest.mark.parametrize("objective", ["gradient_difference", "rmu"])
def test_the_retain_reference_holds_no_padding(objective: str) -> None:
    _, _, terms_of = build(objective)
    kept = getattr(terms_of, "_retain_reference", [])
    assert all(states.untyped_storage().nbytes() == 4 * states.numel() for states in kept)
    assert len(kept) == (len(RETAIN) if objective == "rmu" else 0)
