"""DPO, NPO and SimNPO against trl's own trainers, on a real tiny model and its full padded rows.

trl's losses lack our factor 2/b. Its DPO prefers one answer to another; NPO is that without the preferred one, and
SimNPO its SimPO without it (chosen log-probability 0, gamma = b d).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from seuf_core.data.batches import Batch, collate
from seuf_core.moe.view import moe_view
from tests import tiny
from tests.unlearning.test_objectives import ALTERNATIVES, FORGET, KEPT, PICKED, build, close, shaken

BETA = 0.3
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model before training, and after some: the weights that `shaken` gives ours."""
    return tiny.build_model("qwen2_moe"), shaken(moe_view(tiny.build_model("qwen2_moe"))).model


def one_pair() -> Dataset:
    return Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}])


def batch() -> Batch:
    return collate([FORGET[i] for i in PICKED])


def trl_logps(model: PreTrainedModel, *, average: bool) -> torch.Tensor:
    """trl's log-probability of each example, from the logits of every position and its own shift and mask."""
    rows = batch()
    with torch.no_grad():
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    return CPOTrainer.get_batch_logps(logits, rows.labels, average_log_prob=average)


def cpo_trainer(tmp_path: Path, loss_type: str, beta: float, gamma: float) -> CPOTrainer:
    arguments = CPOConfig(
        str(tmp_path), loss_type=loss_type, beta=beta, simpo_gamma=gamma, cpo_alpha=0.0, **PLAIN
    )
    model = tiny.build_model("qwen2_moe")
    return CPOTrainer(model, arguments, train_dataset=one_pair(), processing_class=tiny.build_tokenizer())


def test_dpo_equals_trl(tmp_path: Path) -> None:
    before, after = models()
    # Without the load-balancing loss, which trl adds for a model with experts.
    arguments = DPOConfig(str(tmp_path), beta=BETA, max_length=None, router_aux_loss_coef=0.0, **PLAIN)
    trainer = DPOTrainer(
        after, before, arguments, train_dataset=one_pair(), processing_class=tiny.build_tokenizer()
    )
    pairs = [
        {
            "prompt_ids": FORGET[i].input_ids[: FORGET[i].labels_from],
            "chosen_ids": ALTERNATIVES[i].input_ids[FORGET[i].labels_from :],
            "rejected_ids": FORGET[i].input_ids[FORGET[i].labels_from :],
        }
        for i in PICKED
    ]
    theirs = trainer.compute_loss(after.eval(), trainer.data_collator(pairs)).detach()
    view, _, terms_of = build("dpo", dpo_beta=BETA)
    shaken(view)
    close(terms_of(PICKED, KEPT).forget, 2 / BETA * theirs)


def test_npo_equals_trl_without_a_preferred_answer(tmp_path: Path) -> None:
    before, after = models()
    rejected = trl_logps(after, average=False) - trl_logps(before, average=False)
    trainer = cpo_trainer(tmp_path, "sigmoid", BETA, 0.0)
    theirs, _, _ = trainer.cpo_loss(torch.zeros_like(rejected), rejected)
    view, _, terms_of = build("npo", npo_beta=BETA)
    shaken(view)
    close(terms_of(PICKED, KEPT).forget, 2 / BETA * theirs.mean())


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_simnpo_equals_trl_simpo_without_a_preferred_answer(margin: float, tmp_path: Path) -> None:
    _, after = models()
    rejected = trl_logps(after, average=True)
    trainer = cpo_trainer(tmp_path, "simpo", 2.5, 2.5 * margin)
    theirs, _, _ = trainer.cpo_loss(torch.zeros_like(rejected), rejected)
    view, _, terms_of = build("simnpo", simnpo_beta=2.5, simnpo_margin=margin)
    shaken(view)
    close(terms_of(PICKED, KEPT).forget, 2 / 2.5 * theirs.mean())
