"""A job whose model is opened and whose texts are tokens: what attribution, training and measuring share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from seuf_core.data.batches import encode_alternatives, encode_examples
from seuf_core.evaluate.probes import EncodedProbe, encode_probes, sequences_of
from seuf_core.inputs import Inputs
from seuf_core.method import Method
from seuf_core.moe.skeleton import open_model
from seuf_core.moe.trail import Trail
from seuf_core.moe.view import MoEView, require_experts
from seuf_core.observer import Observer
from seuf_core.plan.setting import Residency
from seuf_core.unlearning.terms import TrainingData


@dataclass(frozen=True)
class Job:
    """What every later step needs. `folder` is the base model's, which is only read.

    residency: which decoder layers are in memory: `whole`, all of them; `suffix`, none while experts are scored, then
    those from the lowest target layer on; `streamed`, then those of the targets only. The others are read when they
    are needed. micro_batch_tokens: padded tokens that go through at once while training; None = a whole step.
    trail: what flowed into the layers of the base model; None where nobody will ask.
    """

    folder: Path
    view: MoEView
    inputs: Inputs
    data: TrainingData
    selection_probes: list[EncodedProbe]
    test_probes: list[EncodedProbe]
    method: Method
    observer: Observer
    residency: Residency = "whole"
    micro_batch_tokens: int | None = None
    trail: Trail | None = None

    def hold_for(self, targets: Mapping[int, tuple[int, ...]]) -> None:
        """Keep the layers in memory that training these experts keeps there; without any, all of them."""
        layers = range(self.view.num_layers)
        if targets and self.residency != "whole":
            layers = range(min(targets), self.view.num_layers)
        self.view.weights.hold(targets if targets and self.residency == "streamed" else layers)


def load(
    model: Path, hold: Iterable[int] | None = None, device: torch.device | str | None = None
) -> tuple[MoEView, PreTrainedTokenizerBase]:
    """Model in the dtype it is stored in, in eval mode, and its tokenizer; from disk only, no remote code.

    Args:
        hold: the decoder layers to keep in memory; None = all. The others are read when they are needed.
        device: None = the GPU where there is one.

    Raises as `open_model` does.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    view = open_model(model, device)
    view.weights.hold(range(view.num_layers) if hold is None else hold)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return view, tokenizer


def open_job(
    model: Path,
    inputs: Inputs,
    method: Method,
    observer: Observer,
    residency: Residency = "whole",
    device: torch.device | str | None = None,
) -> Job:
    """Load the model and tokenise everything, so that a text that cannot be used is known before the training.

    Says how many examples and probes `max_length` cut. `residency`: see `Job`; `device`: see `load`.

    Raises:
        ModelError: dense_model, when the scope chooses experts and the model has none; and as `open_model` does.
        DataError: see `encode_pairs`.
    """
    view, tokenizer = load(model, None if residency == "whole" else (), device)
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
    answers = sequences_of(selection + test)
    for code, what, sequences in (
        ("examples_cut", "training examples", forget + retain + alternatives),
        ("probes_cut", "choices of probes", answers),
    ):
        if cut := sum(encoded.truncated for encoded in sequences):
            message = f"{cut} of {len(sequences)} {what} were cut to {method.max_length} tokens."
            observer.event("warning", {"code": code, "message": message})
    data = TrainingData(forget, retain, alternatives)
    return Job(model, view, inputs, data, selection, test, method, observer, residency)
