"""The naive step that ours is held against is the plain thing: written out once more by hand, it ends the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.naive import Naive
from benchmarks.setting import Objective, method_of, training_data
from benchmarks.shapes import tiny_fields, write_shape
from seuf_core.method import Method
from seuf_core.moe.view import moe_view
from seuf_core.unlearning import losses
from seuf_core.unlearning.terms import TrainingData

LAYER, TARGET_EXPERT, RATE = 2, 3, 1e-3
FORGET, RETAIN = [5, 1, 7, 2], [3, 0, 4, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape("olmoe-125m", tmp_path_factory.mktemp("shape"), **tiny_fields("olmoe-125m"))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def data() -> TrainingData:
    return training_data(vocab_size=512, number=8, length=12)


def outputs(model: PreTrainedModel, rows: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities [B, S-1] of the tokens, the layer's output where they are predicted, router logits."""
    ids = torch.tensor(rows)
    found = model(input_ids=ids, output_hidden_states=True, output_router_logits=True)
    said = found.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return said, found.hidden_states[LAYER + 1][:, :-1], found.router_logits[LAYER]


def loss_by_hand(model: PreTrainedModel, before: PreTrainedModel, method: Method) -> torch.Tensor:
    forget = [data().forget[index].input_ids for index in FORGET]
    retain = [data().retain[index].input_ids for index in RETAIN]
    said, states, router = outputs(model, forget)
    kept, kept_states, _ = outputs(model, retain)
    with torch.no_grad():
        said_before = outputs(before, forget)[0]
        kept_before = outputs(before, retain)[1]
    if method.objective == "rmu":
        goal = 20.0 * losses.control_vector(64, method.seed)
        forget_term, retain_term = (
            F.mse_loss(states, goal.expand_as(states)),
            F.mse_loss(kept_states, kept_before),
        )
    else:
        retain_term = -kept.mean()
        forget_term = said.mean()
        if method.objective == "npo":
            odds = said_before.sum(1) - said.sum(1)
            forget_term = -(2 / 0.1) * F.logsigmoid(0.1 * odds).mean()
    loss = forget_term + method.retain_weight * retain_term
    if method.trains_router:
        goal = F.one_hot(torch.tensor(TARGET_EXPERT), 8).float()
        loss = loss + method.anchor_weight * (router.softmax(-1) - goal).square().sum(-1).mean()
    return loss


@pytest.mark.parametrize("router", ["freeze", "train"])
@pytest.mark.parametrize("objective", ["rmu", "npo", "gradient_difference"])
def test_one_step_is_the_one_written_by_hand(folder: Path, objective: Objective, router: str) -> None:
    method = method_of(objective, router=router)  # type: ignore[arg-type]
    model, base, before = load(folder), load(folder), load(folder)
    # Away from the base, so that a retain term which is 0 there has a gradient.
    for moving in (model, base):
        moving.model.layers[LAYER].mlp.experts.down_proj.data.mul_(1.1)
    naive = Naive(moe_view(model), before, method, data(), {LAYER: (TARGET_EXPERT,)}, RATE)
    with naive.attached():
        loss = naive.step(FORGET, RETAIN).total(method)
    expected = loss_by_hand(base, before, method)
    torch.testing.assert_close(loss.detach(), expected.detach())
    expected.backward()
    for (name, after), start in zip(model.named_parameters(), base.parameters(), strict=True):
        if name.startswith(f"model.layers.{LAYER}.mlp.experts"):
            others = [expert for expert in range(8) if expert != TARGET_EXPERT]
            assert torch.equal(after[others], start[others])
            after, start, gradient = after[TARGET_EXPERT], start[TARGET_EXPERT], start.grad[TARGET_EXPERT]
        elif name == f"model.layers.{LAYER}.mlp.gate.weight" and router == "train":
            gradient = start.grad
        else:
            assert torch.equal(after, start), name
            continue
        # AdamW's first step, without decay.
        stepped = start - RATE * gradient / (gradient.abs() + 1e-8)
        moved = gradient.abs() > 1e-6 * gradient.abs().max()  # else its sign is rounding noise
        torch.testing.assert_close(after[moved], stepped[moved], rtol=1e-4, atol=1e-6)
        assert moved.float().mean() > 0.9


def test_without_a_mask_everything_is_trained(folder: Path) -> None:
    model, before = load(folder), load(folder)
    method = method_of("npo")
    naive = Naive(moe_view(model), before, method, data(), {LAYER: (TARGET_EXPERT,)}, RATE, everything=True)
    with naive.attached():
        naive.step(FORGET, RETAIN)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)


def test_detached_it_leaves_the_model_frozen(folder: Path) -> None:
    model = load(folder)
    naive = Naive(moe_view(model), model, method_of("rmu"), data(), {LAYER: (TARGET_EXPERT,)}, RATE)
    with naive.attached():
        naive.step(FORGET, RETAIN)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not model.model.layers[LAYER].mlp.experts.down_proj._post_accumulate_grad_hooks
