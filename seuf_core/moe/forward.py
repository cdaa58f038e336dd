"""Forward passes that compute what is asked for and no more: logits of answer tokens, states of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from seuf_core.data.batches import Batch


@dataclass(frozen=True)
class AnswerLogits:
    """Logits where a label token is predicted, and nowhere else.

    logits: [P, V] in the model's dtype; target: [P] the label token ids; row: [P] which sequence of the batch;
    num_sequences: B.
    """

    logits: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    num_sequences: int


def answer_logits(model: PreTrainedModel, batch: Batch) -> AnswerLogits:
    """Run the whole model, but its head only on the P positions before a label token.

    The rest of the model's own head code (scaling, soft caps) still runs: only the input of the output embedding
    is narrowed. Memory of the logits: P * V instead of B * S * V.
    """
    labels = batch.labels[:, 1:]
    row, position = torch.where(labels != -100)

    def keep_answers(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][row, position][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_answers)
    try:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return AnswerLogits(output.logits[0], labels[row, position], row, labels.shape[0])


def layer_states(model: PreTrainedModel, layer: int, batch: Batch) -> torch.Tensor:
    """Output of decoder layer `layer` [B, S, H]; the layers above it and the head are not run."""
    decoder = model.get_decoder()
    layers, captured = decoder.layers, []

    def capture(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[layer].register_forward_hook(capture)
    decoder.layers = layers[: layer + 1]
    try:
        decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        decoder.layers = layers
        handle.remove()
    states: torch.Tensor = captured[0]
    return states
