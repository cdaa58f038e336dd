"""A job whose model is loaded and whose texts are tokens: what attribution, training and measuring share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seuf_core.data.batches import encode_alternatives, encode_examples
from seuf_core.evaluate.probes import EncodedProbe, encode_probes
from seuf_core.inputs import Inputs
from seuf_core.method import Method
from seuf_core.moe.view import MoEView, moe_view, require_experts
from seuf_core.observer import Observer
from seuf_core.unlearning.terms import TrainingData


@dataclass(frozen=True)
class Job:
    """What every later step needs. `folder` is the base model's, which is only read."""

    folder: Path
    view: MoEView
    inputs: Inputs
    data: TrainingData
    selection_probes: list[EncodedProbe]
    test_probes: list[EncodedProbe]
    method: Method
    observer: Observer


def load(model: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in the dtype it is stored in, in eval mode, and its tokenizer; from disk only, no remote code."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return loaded.to(device).eval(), tokenizer


def open_job(model: Path, inputs: Inputs, method: Method, observer: Observer) -> Job:
    """Load the model and tokenise everything, so that a text that cannot be used is known before the training.

    Says how many examples and probes `max_length` cut.

    Raises:
        ModelError: dense_model, when the scope chooses experts and the model has none.
        DataError: see `encode_pairs`.
    """
    loaded, tokenizer = load(model)
    view = moe_view(loaded)
    if method.selects_experts:
        require_experts(view)
    forget, retain = (
        encode_examples(tokenizer, examples, method.max_length)
        for examples in (inputs.forget.train, inputs.retain.train if inputs.retain else [])
    )
    alternatives = (
        encode_alternatives(tokenizer, inputs.forget.train, method.max_length, method.dpo_alternative)
        if method.objective == "dpo"
        else []
    )
    selection, test = (
        encode_probes(tokenizer, probes, method.max_length)
        for probes in (inputs.selection_probes, inputs.test_probes)
    )
    answers = [sequence for probe in selection + test for sequence in probe.sequences]
    for code, what, sequences in (
        ("examples_cut", "training examples", forget + retain + alternatives),
        ("probes_cut", "choices of probes", answers),
    ):
        if cut := sum(encoded.truncated for encoded in sequences):
            message = f"{cut} of {len(sequences)} {what} were cut to {method.max_length} tokens."
            observer.event("warning", {"code": code, "message": message})
    data = TrainingData(forget, retain, alternatives)
    return Job(model, view, inputs, data, selection, test, method, observer)
