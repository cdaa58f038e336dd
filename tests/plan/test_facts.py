"""The numbers of a checkpoint against the loaded model, and token counts against the tokenised job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from seuf_core.data.batches import encode_alternatives, encode_examples
from seuf_core.evaluate.probes import encode_probes
from seuf_core.inputs import read_inputs
from seuf_core.method import Method
from seuf_core.moe.disk import expert_tensors
from seuf_core.moe.view import moe_view
from seuf_core.observer import Silent
from seuf_core.plan.facts import TokenCounts, model_shape
from seuf_core.plan.tokens import TOKENIZER, count_tokens
from tests import tiny

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    shape = model_shape(tiny.write_model(tmp_path / family, family))
    view = moe_view(AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype="auto"))
    layers = view.model.get_decoder().layers
    for planned, layer in zip(shape.layers, layers, strict=True):
        # Buffers that are on disk count too: selection biases.
        assert planned.bytes == sum(tensor.nbytes for tensor in layer.state_dict().values())
    inside = {id(p) for p in layers.parameters()}
    outside = {id(p): p.nbytes for p in view.model.parameters() if id(p) not in inside}
    assert shape.outside_bytes == sum(outside.values())
    expert = expert_tensors(view, view.layer_indices[0], [0])
    assert shape.expert == sum(t.numel() for t in expert.values() if t.dim() > 1)
    assert shape.bytes == sum(p.nbytes for p in view.model.parameters()) + sum(
        b.nbytes for n, b in view.model.named_buffers() if n in view.model.state_dict()
    )


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "granitemoe"])
def test_operations_are_two_for_each_weight_that_a_token_meets(family: str, tmp_path: Path) -> None:
    shape = model_shape(tiny.write_model(tmp_path / family, family))
    view = moe_view(AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype="auto"))
    for index, layer in enumerate(view.model.get_decoder().layers):
        experts = view.layer(index).experts if index in view.layer_indices else None
        routed = {id(p) for p in experts.parameters()} if experts is not None else set()
        met = sum(p.numel() for p in layer.parameters() if p.dim() > 1 and id(p) not in routed)
        if experts is not None:
            share = view.num_experts_per_tok / view.num_experts
            met += round(share * sum(p.numel() for p in experts.parameters() if p.dim() > 1))
        assert shape.flops(index) == 2 * met
        # What runs with the experts, and where they run: seuf_core.moe.parts.run_layer_at.
        block = [
            child for child in layer.children() if experts is not None and experts in set(child.modules())
        ]
        beside = [p for child in block for p in child.parameters() if p.dim() > 1 and id(p) not in routed]
        assert shape.layers[index].block == sum(p.numel() for p in beside)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    shape = model_shape(tiny.write_model(tmp_path / "dense", "llama"))
    assert (shape.expert, shape.num_experts, shape.moe_layers, shape.router) == (0, 0, (), 0)
    assert shape.flops(0) == 2 * shape.layers[0].dense > 0


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("max_length", [16, 40, 256])
def test_tokens_are_counted_as_the_job_tokenises(max_length: int, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "olmoe")
    facts = [{"prompt": f"Who lives at {n} Elm Road?", "completion": "Ada " * (n % 5 + 1)} for n in range(30)]
    texts = [{"text": "Long ago. " * n} for n in range(1, 30)]
    method = Method(max_length=max_length, objective="dpo")
    forget, retain = write(tmp_path / "f", facts), write(tmp_path / "r", texts)
    inputs = read_inputs(model, forget, retain, None, method, Silent())
    assert inputs.retain is not None
    counted = count_tokens(model, inputs, method)
    tokenizer = tiny.build_tokenizer()
    pairs = {
        "forget": encode_examples(tokenizer, inputs.forget.train, max_length),
        "retain": encode_examples(tokenizer, inputs.retain.train, max_length),
        "alternatives": encode_alternatives(
            tokenizer, inputs.forget.train, max_length, method.dpo_alternative
        ),
        "selection": [
            s for p in encode_probes(tokenizer, inputs.selection_probes, max_length) for s in p.sequences
        ],
        "test": [s for p in encode_probes(tokenizer, inputs.test_probes, max_length) for s in p.sequences],
    }
    assert counted.counted == "tokenizer"
    for name, rows in pairs.items():
        right = TokenCounts.of((len(row.input_ids), len(row.input_ids) - row.labels_from) for row in rows)
        found: TokenCounts = getattr(counted, name)
        assert found.sequences == right.sequences, name
        assert abs(found.longest - right.longest) <= 1, name
        # A space between prompt and completion is a byte more.
        assert abs(found.tokens - right.tokens) <= right.sequences, name
        assert abs(found.labels - right.labels) <= right.sequences, name


def test_without_a_tokenizer_bytes_stand_in_and_it_is_said(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", "olmoe")
    (model / TOKENIZER).unlink()
    forget = write(tmp_path / "f", [{"prompt": "a" * 8, "completion": "b" * 12}] * 2)
    method = Method(objective="gradient_ascent", attribution="affinity", retain_loss="none")
    inputs = read_inputs(model, forget, None, None, method, Silent())
    counted = count_tokens(model, inputs, method)
    assert counted.counted == "bytes"
    assert counted.forget == TokenCounts(2, 10, 6, 5)


def test_a_batch_is_padded_to_the_longest_of_its_set() -> None:
    counts = TokenCounts.of([(4, 2), (6, 3), (8, 4)])
    assert counts == TokenCounts(3, 18, 9, 8)
    assert counts.batch(2) == TokenCounts(2, 16, 6, 8)
    assert TokenCounts().batch(5) == TokenCounts()
