"""The loss of one step, put together by hand: which rows, which positions, which reference.

The oracle runs every example alone and unpadded through the model's ordinary forward pass, and computes each
formula from probabilities, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import pytest
import torch

from seuf_core import method as methods
from seuf_core.data.batches import Encoded, collate
from seuf_core.errors import MethodError
from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.moe import forward
from seuf_core.moe.forward import Forward
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import hidden, likelihood, losses
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
# The same prompts with other answers, some of them longer.
ALTERNATIVES = [
    Encoded(row.input_ids[: row.labels_from] + [40 + n, 50, 60, 70][: 1 + n % 4], row.labels_from, False)
    for n, row in enumerate(FORGET)
]
PICKED, KEPT = [3, 0, 1], [2, 1]
OBJECTIVES = get_args(methods.Objective)
OVER_LIKELIHOODS = tuple(name for name in OBJECTIVES if name not in HIDDEN_STATE_OBJECTIVES)


def method(objective: str, **fields: Any) -> Method:
    return Method(objective=objective, batch_size=2, **fields)  # type: ignore[arg-type]


def build(
    objective: str,
    forget: list[Encoded] = FORGET,
    retain: list[Encoded] = RETAIN,
    targets: dict[int, tuple[int, ...]] = TARGETS,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> tuple[MoEView, Method, Objective]:
    view = moe_view(tiny.build_model("qwen2_moe").to(dtype))
    chosen = method(objective, **fields)
    alternatives = ALTERNATIVES[: len(forget)] if objective == "dpo" else []
    data = TrainingData(forget, retain, alternatives)
    return view, chosen, build_objective(Forward(view), chosen, data, targets)


def shaken(view: MoEView) -> MoEView:
    """The same model after some training: its target layers have moved."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in TARGETS:
            for weight in (view.layer(layer).experts.down_proj, view.layer(layer).router.weight):
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return view


def close(found: torch.Tensor, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(
        found.detach(), torch.as_tensor(expected, dtype=found.dtype), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def logits_of(view: MoEView, row: Encoded) -> tuple[torch.Tensor, list[int]]:
    """Logits [n, V] in double from which each of the n label tokens of one example is predicted, and those tokens."""
    logits = view.model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    return logits[row.labels_from - 1 : len(row.input_ids) - 1], row.input_ids[row.labels_from :]


@dataclass(frozen=True)
class Token:
    """One label token: its id y, and the logits [V] it is predicted from, now and before training."""

    y: int
    z: torch.Tensor
    z_ref: torch.Tensor

    @property
    def p(self) -> float:
        return float(self.z.softmax(-1)[self.y])

    @property
    def log_p(self) -> float:
        return float(self.z.log_softmax(-1)[self.y])

    @property
    def log_p_ref(self) -> float:
        return float(self.z_ref.log_softmax(-1)[self.y])


Example = list[Token]


def seen(view: MoEView, picked: list[Encoded], before: list[torch.Tensor]) -> list[Example]:
    return [
        [Token(y, z, z_ref) for y, z, z_ref in zip(ids, now, then, strict=True)]
        for (now, ids), then in zip((logits_of(view, row) for row in picked), before, strict=True)
    ]


def l(example: Example) -> float:  # noqa: E743 - the letter of the formulas
    return -sum(token.log_p for token in example)


def l_ref(example: Example) -> float:
    return -sum(token.log_p_ref for token in example)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def soft(b: float, x: float) -> float:
    """-(2/b) log sigmoid(b x)."""
    return 2 / b * math.log(1 + math.exp(-b * x))


def divergence_to(target: torch.Tensor, z: torch.Tensor) -> float:
    """Cross-entropy of softmax(z) to a distribution."""
    return -float((target * z.log_softmax(-1)).sum())


def lowered(token: Token, b: float) -> torch.Tensor:
    z = token.z_ref.clone()
    z[token.y] -= b
    return z.softmax(-1)


def without(token: Token) -> torch.Tensor:
    others = token.z.softmax(-1)
    others[token.y] = 0
    return others / others.sum()


Oracle = Callable[[list[Example], list[Example]], float]
PER_EXAMPLE: dict[str, Callable[[Example, Example], float]] = {
    "gradient_ascent": lambda e, _: -l(e) / len(e),
    "gradient_difference": lambda e, _: -l(e) / len(e),
    "npo": lambda e, _: soft(0.3, l(e) - l_ref(e)),
    "simnpo": lambda e, _: soft(1.5, l(e) / len(e) - 0.5),
    "dpo": lambda e, w: soft(0.2, (l_ref(w) - l(w)) - (l_ref(e) - l(e))),
}
PER_TOKEN: dict[str, Callable[[Token], float]] = {
    "undial": lambda t: divergence_to(lowered(t, 3.0), t.z),
    "ce_u": lambda t: divergence_to(without(t), t.z),
    "wga": lambda t: t.p**0.5 * t.log_p,
    "satimp": lambda t: t.p**0.7 * (1 - t.p) ** 1.3 * t.log_p,
    "pdu": lambda t: float((t.z.max() - t.z.mean()) ** 2),
}
SETTINGS: dict[str, Any] = {
    "npo_beta": 0.3,
    "simnpo_beta": 1.5,
    "simnpo_margin": 0.5,
    "dpo_beta": 0.2,
    "undial_strength": 3.0,
    "wga_beta": 0.5,
    "satimp_beta1": 0.7,
    "satimp_beta2": 1.3,
}


def expected_forget(name: str, examples: list[Example], alternatives: list[Example]) -> float:
    if name in PER_EXAMPLE:
        pairs = zip(examples, alternatives, strict=True)
        return mean([PER_EXAMPLE[name](example, other) for example, other in pairs])
    return mean([PER_TOKEN[name](token) for example in examples for token in example])


@pytest.mark.parametrize("name", OVER_LIKELIHOODS)
def test_the_forget_term_by_hand(name: str) -> None:
    view, _, terms_of = build(name, **SETTINGS)
    picked, others = [FORGET[i] for i in PICKED], [ALTERNATIVES[i] for i in PICKED]
    before = [[logits_of(view, row)[0] for row in some] for some in (picked, others)]
    at_first = float(terms_of(PICKED, KEPT).forget.detach())
    shaken(view)
    examples, alternatives = seen(view, picked, before[0]), seen(view, others, before[1])
    assert abs(l(examples[0]) - l_ref(examples[0])) > 0.1
    found = terms_of(PICKED, KEPT).forget
    close(found, expected_forget(name, examples, alternatives))
    assert float(found.detach()) != pytest.approx(at_first, rel=1e-3)


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_a_preference_starts_at_log_two(name: str) -> None:
    """(2/b) ln 2: nothing has moved from the reference."""
    _, _, terms_of = build(name, npo_beta=0.4, dpo_beta=0.4)
    close(terms_of(PICKED, KEPT).forget, 5 * math.log(2))


@pytest.mark.parametrize("name", [name for name in OVER_LIKELIHOODS if name != "gradient_ascent"])
@pytest.mark.parametrize("retain_loss", ["cross_entropy", "kl"])
def test_the_retain_term_by_hand(name: str, retain_loss: str) -> None:
    """Mean over the label tokens of the retain rows; KL from the model before training to the one now."""
    view, chosen, terms_of = build(name, retain_loss=retain_loss)
    kept = [RETAIN[i] for i in KEPT]
    before = [logits_of(view, row)[0] for row in kept]
    first = terms_of(PICKED, KEPT).retain
    if retain_loss == "kl":
        close(first, 0.0)
    shaken(view)
    tokens = [token for example in seen(view, kept, before) for token in example]
    expected = {
        "cross_entropy": mean([-token.log_p for token in tokens]),
        "kl": mean(
            [
                divergence_to(token.z_ref.softmax(-1), token.z)
                - divergence_to(token.z_ref.softmax(-1), token.z_ref)
                for token in tokens
            ]
        ),
    }[retain_loss]
    found = terms_of(PICKED, KEPT)
    assert expected > 0.01
    close(found.retain, expected)
    close(found.anchor, 0.0)
    weight = chosen.retain_weight if found.retain_weight is None else found.retain_weight
    close(found.total(chosen), (found.forget + weight * found.retain).detach())


@pytest.mark.parametrize("name", ["gradient_ascent", "undial", "dpo", "rmu"])
def test_without_a_retain_term_no_retain_row_is_run(name: str) -> None:
    view, _, terms_of = build(name, retain_loss="none")
    ran: list[int] = []
    view.model.get_input_embeddings().register_forward_hook(lambda _, args, __: ran.append(args[0].shape[0]))
    found = terms_of(PICKED, KEPT)
    assert ran == [6 if name == "dpo" else 3]
    assert float(found.retain.detach()) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_base_that_nothing_looks_at_is_not_run(name: str) -> None:
    """Passes over the forget part only where its likelihoods or states are a reference; none over retain."""
    passes: list[int] = []
    view = moe_view(tiny.build_model("qwen2_moe"))
    view.model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    chosen = method(name, retain_loss="cross_entropy" if name == "pdu" else "none")
    alternatives = ALTERNATIVES if name == "dpo" else []
    build_objective(Forward(view), chosen, TrainingData(FORGET, RETAIN, alternatives), TARGETS)
    # 5 forget or 4 retain examples in batches of 2; dpo takes the alternatives too
    expected = {"npo": 3, "dpo": 6, "undial": 3, "rmu": 3, "adaptive_rmu": 3, "pdu": 2}
    assert len(passes) == expected.get(name, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_anchor_sees_every_real_forget_token_of_every_target_layer(name: str) -> None:
    """With every objective; prompt tokens count, padding, retain rows and alternatives do not."""
    view, chosen, terms_of = build(name, router="train", anchor_weight=7.0)
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
    found = terms_of(PICKED, KEPT)
    close(found.anchor, expected)
    weight = chosen.retain_weight if found.retain_weight is None else found.retain_weight
    close(found.total(chosen), (found.forget + weight * found.retain).detach() + 7 * expected)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "gradient_ascent"])
def test_without_a_weight_the_retain_rows_do_not_move_anything(name: str) -> None:
    def gradients(kept: list[int], weight: float) -> dict[str, torch.Tensor]:
        view, chosen, terms_of = build(name, retain_weight=weight)
        scope = ExpertScope(view, TARGETS, train_router=False)
        shaken(view)  # else the hidden retain term is 0 and has no gradient to leave out
        with scope.attached():
            terms_of(PICKED, kept).total(chosen).backward()
        return {n: p.grad for n, p in scope.named_parameters().items() if p.grad is not None}

    without, weightless, weighty = gradients([], 1.0), gradients(KEPT, 0.0), gradients(KEPT, 1.0)
    assert without
    for leaf, gradient in without.items():
        torch.testing.assert_close(weightless[leaf], gradient, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(weighty[n], g, rtol=1e-2, atol=1e-4) for n, g in without.items())


BOTH_TERMS = [(name, "cross_entropy") for name in OVER_LIKELIHOODS] + [
    ("npo", "kl"),
    ("rmu", "hidden_mse"),
    ("adaptive_rmu", "hidden_mse"),
]


@pytest.mark.parametrize(("name", "retain_loss"), BOTH_TERMS)
def test_padding_changes_no_term(name: str, retain_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A very long retain example in the batch pads every other row, and any token may fill the padding."""
    long = rows((60,), 5)
    view, _, terms_of = build(name, retain=[*RETAIN, *long], router="train", retain_loss=retain_loss)
    shaken(view)
    short, padded = terms_of(PICKED, KEPT), terms_of(PICKED, [*KEPT, len(RETAIN)])
    close(padded.forget, short.forget.detach())
    close(padded.anchor, short.anchor.detach())
    assert float(padded.retain.detach()) != pytest.approx(float(short.retain.detach()), rel=1e-3)
    alone, beside = terms_of([0], [2]), terms_of([0, 1], [2])  # 11 tokens beside 4 and 3
    close(beside.retain, alone.retain.detach())
    for module in (forward, hidden):
        monkeypatch.setattr(module, "collate", partial(collate, pad_token_id=77), raising=False)
    filled = terms_of(PICKED, KEPT)
    for part in ("forget", "retain", "anchor"):
        close(getattr(filled, part), getattr(short, part).detach())


@pytest.mark.parametrize(("name", "retain_loss"), BOTH_TERMS)
def test_what_stands_where_no_label_is_predicted_changes_no_term(name: str, retain_loss: str) -> None:
    """What the last attention says to prompt, padding and last positions becomes large noise; to labels it does not."""
    view, _, terms_of = build(name, retain_loss=retain_loss)
    shaken(view)
    alternatives = PICKED if name == "dpo" else []
    data = TrainingData(FORGET, RETAIN, ALTERNATIVES)
    free = ~collate(data.rows(PICKED, KEPT, alternatives)).predicts_label()
    assert 0 < int(free.sum()) < free.numel()
    plain = terms_of(PICKED, KEPT)

    def spoil(_: object, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        said, *rest = output
        if said.shape[:2] == free.shape:  # else it is asked for the labels alone
            said = torch.where(free[..., None], 1e3 * torch.randn(said.shape), said)
            spoilt.append(said)
        return (said, *rest)

    spoilt: list[torch.Tensor] = []
    last = 1 if name in HIDDEN_STATE_OBJECTIVES else -1
    view.model.get_decoder().layers[last].self_attn.register_forward_hook(spoil)
    spoiled = terms_of(PICKED, KEPT)
    assert spoilt
    close(spoiled.forget, plain.forget.detach())
    close(spoiled.retain, plain.retain.detach())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_example_is_compared_with_itself(name: str) -> None:
    """Any order of the rows and any split into batches gives the same references."""
    view, _, terms_of = build(name)
    shaken(view)
    found, backward = terms_of(PICKED, KEPT), terms_of(PICKED[::-1], KEPT[::-1])
    close(backward.forget, found.forget.detach())
    close(backward.retain, found.retain.detach())
    again, _, _ = build(name)
    large = Method(objective=name, batch_size=64)  # type: ignore[arg-type]
    data = TrainingData(FORGET, RETAIN, ALTERNATIVES if name == "dpo" else [])
    other = build_objective(Forward(again), large, data, TARGETS)
    shaken(again)
    close(other(PICKED, KEPT).forget, found.forget.detach())
    close(other(PICKED, KEPT).retain, found.retain.detach())


def test_every_name_of_the_method_is_in_one_table() -> None:
    assert set(likelihood.FORGET_TERMS) | HIDDEN_STATE_OBJECTIVES == set(OBJECTIVES)
    assert set(likelihood.RETAIN_TERMS) | {"none", "hidden_mse"} == set(get_args(methods.RetainLoss))


def test_dpo_needs_an_alternative_for_each_forget_sequence() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    with pytest.raises(MethodError, match="5 forget sequences, and has 4") as caught:
        build_objective(Forward(view), method("dpo"), TrainingData(FORGET, RETAIN, ALTERNATIVES[:4]), TARGETS)
    assert caught.value.code == "alternatives_required"


def test_pdu_needs_a_retain_set() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    with pytest.raises(MethodError, match="pdu") as caught:
        build_objective(Forward(view), method("pdu"), TrainingData(FORGET, []), TARGETS)
    assert caught.value.code == "retain_set_required"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_pdu_learns_something(name: str) -> None:
    _, _, terms_of = build(name)
    assert (set(terms_of.state()) == {"retain_weight"}) is (name == "pdu")
    terms_of.load_state({})


def test_the_control_vector_is_that_of_the_seed() -> None:
    _, _, terms_of = build("rmu", rmu_coefficient=3.0, seed=6)
    torch.testing.assert_close(terms_of._goal, 3.0 * losses.control_vector(32, 6))  # type: ignore[attr-defined]
