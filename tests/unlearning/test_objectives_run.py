"""Every objective trains a real tiny model that knows its examples, in every kind of scope, and does what it claims.

What is claimed is measured by itself, not by the loss: how likely the forgotten answers are, how flat the logits, where
the hidden states point.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seuf_core.data.batches import collate
from seuf_core.errors import Cancelled
from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.moe.forward import Forward
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning import losses
from seuf_core.unlearning.loop import train_rung
from seuf_core.unlearning.objectives import TrainingData, build_objective
from seuf_core.unlearning.scopes import build_trainable, snapshot
from seuf_core.unlearning.state import TrainingState
from tests import tiny
from tests.unlearning.test_loop import BASE, GOOD, Recorder, make_run, same
from tests.unlearning.test_objectives import ALTERNATIVES, FORGET, OBJECTIVES, RETAIN, TARGETS, logits_of
from tests.unlearning.test_objectives_rmu import states

STEPS = 8
# One of each kind: experts, adapters without a target layer, everything.
RATES = {"seuf": 1e-2, "lora": 1e-2, "full": 1e-3}


@pytest.fixture(scope="module")
def knowing() -> dict[str, torch.Tensor]:
    """Weights of a model that has learned both sets: several objectives leave alone what is not known."""
    model = tiny.build_model("qwen2_moe")
    batch = collate([*FORGET, *RETAIN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
    return model.state_dict()


def forgotten_nll(view: MoEView) -> float:
    """Mean over examples of l, of the forget set."""
    total = 0.0
    for row in FORGET:
        logits, ids = logits_of(view, row)
        total -= float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
    return total / len(FORGET)


def preference(view: MoEView) -> float:
    """How much likelier, in nats, the forgotten answers are than their alternatives."""
    lost = forgotten_nll(view)
    preferred = 0.0
    for row in ALTERNATIVES:
        logits, ids = logits_of(view, row)
        preferred -= float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
    return preferred / len(ALTERNATIVES) - lost


def margin(view: MoEView) -> float:
    """Mean distance of the largest logit from the mean logit."""
    logits = torch.cat([logits_of(view, row)[0] for row in FORGET])
    return float((logits.amax(-1) - logits.mean(-1)).mean())


def astray(view: MoEView) -> float:
    """Minus the mean cosine of the forget states of layer 1 and the control vector of seed 0."""
    found = torch.cat([states(view, row, 1) for row in FORGET])
    return -float(torch.cosine_similarity(found, losses.control_vector(32, 0)[None]).mean())


# What falls while the objective works; of the others the likelihood of the forgotten answers.
CLAIMS = {"dpo": preference, "pdu": margin, "rmu": astray, "adaptive_rmu": astray}


@pytest.mark.parametrize("scope", RATES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_and_moves_what_it_claims(
    name: str, scope: str, knowing: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    layer = 1 if name in HIDDEN_STATE_OBJECTIVES and scope != "seuf" else "auto"
    method = Method(
        objective=name,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        rmu_layer=layer,  # type: ignore[arg-type]
        steps=STEPS,
        evaluate_every=STEPS,
        batch_size=len(FORGET),  # so that every step has the same forget batch, and its losses compare
    )
    view = moe_view(tiny.build_model("qwen2_moe"))
    view.model.load_state_dict(knowing)
    targets = TARGETS if scope == "seuf" else {}
    observer = Recorder()
    trainable = build_trainable(view, method, targets, on_disk=None, retain=RETAIN, observer=observer)
    data = TrainingData(FORGET, RETAIN, ALTERNATIVES if name == "dpo" else [])
    run = replace(
        make_run(tmp_path, observer=observer)[0],
        method=method,
        trainable=trainable,
        initial=snapshot(trainable),
        objective=build_objective(Forward(view), method, data, targets),
        evaluate=lambda: BASE,
    )
    claim = CLAIMS.get(name, lambda view: -forgotten_nll(view))
    before = claim(view)
    train_rung(run, 0, RATES[scope])
    assert all(math.isfinite(loss) for loss in observer.of("step", "loss"))
    forget = observer.of("step", "forget_loss")
    assert len(forget) == STEPS
    assert forget[-1] < forget[0]
    assert not same(snapshot(trainable), run.initial)
    trainable.merge()
    assert claim(view) < before - 1e-3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_resumed_pdu_run_has_the_same_weight_and_ends_the_same(
    stop_at: int, whole: bool, tmp_path: Path
) -> None:
    fields = {"objective": "pdu", "pdu_rate": 0.7, "pdu_slack": 0.0, "steps": 5}
    undisturbed, _ = make_run(tmp_path / "a", whole=whole, **fields)
    expected = train_rung(undisturbed, 0, 1e-2)
    stopped, _ = make_run(tmp_path / "b", whole=whole, observer=Recorder(stop_at), **fields)
    with pytest.raises(Cancelled):
        train_rung(stopped, 0, 1e-2)
    resumed, _ = make_run(tmp_path / "b", whole=whole, **fields)
    found = train_rung(resumed, 0, 1e-2)
    assert same(found.values, expected.values)
    assert same(snapshot(resumed.trainable), snapshot(undisturbed.trainable))
    weight = undisturbed.objective.state()["retain_weight"]
    assert torch.equal(resumed.objective.state()["retain_weight"], weight)
    assert float(weight) != 1.0
    kept = TrainingState.load(tmp_path / "b" / "rung-0.safetensors", f"one/{1e-2!r}")
    assert kept is not None
    assert torch.equal(kept.objective["retain_weight"], weight)


def test_every_rung_of_pdu_begins_with_the_given_weight(tmp_path: Path) -> None:
    """The second rate is tried as if there had been no first."""
    fields = {"objective": "pdu", "pdu_slack": 0.0, "steps": 3}
    run, _ = make_run(tmp_path / "a", GOOD[:1], **fields)
    train_rung(run, 0, 5e-2)
    second = train_rung(run, 1, 1e-2)
    alone, _ = make_run(tmp_path / "b", GOOD[:1], **fields)
    assert same(second.values, train_rung(alone, 1, 1e-2).values)
    assert torch.equal(run.objective.state()["retain_weight"], alone.objective.state()["retain_weight"])
