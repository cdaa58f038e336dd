"""Probes against generate() and against likelihoods computed one choice at a time."""

from __future__ import annotations

import pytest
import torch

from seuf_core.data.batches import Encoded
from seuf_core.data.records import Example, Probe, probe_of
from seuf_core.evaluate.probes import (
    EncodedProbe,
    ProbeScore,
    encode_probes,
    score_probes,
    summarise,
)
from seuf_core.moe.forward import Forward
from seuf_core.moe.view import moe_view
from tests import tiny


def probe(i: int, choices: tuple[str, ...], answer: int, prompt: str = "The symbol of iron is") -> Probe:
    return Probe(f"p{i}", prompt + "?" * i, choices, answer, f"f{i}", "chemistry", "forget")


@torch.no_grad()
def mean_log_prob(model: torch.nn.Module, prompt: str, choice: str) -> float:
    tokenizer = tiny.build_tokenizer()
    prefix, answer = (tokenizer(text)["input_ids"] for text in (prompt, choice))
    log_probs = model(input_ids=torch.tensor([prefix + answer])).logits[0].log_softmax(-1)
    at = [float(log_probs[len(prefix) + i - 1, token]) for i, token in enumerate(answer)]
    return sum(at) / len(at)


def test_choice_is_the_highest_mean_log_probability() -> None:
    model, tokenizer = tiny.build_model("qwen2_moe"), tiny.build_tokenizer()
    choices = (" Fe", " Copper", " Q", " zz top")
    probes = [probe(i, choices, i % 4) for i in range(8)]
    scores = score_probes(Forward(moe_view(model)), encode_probes(tokenizer, probes, 64), tokens_per_batch=70)
    assert {s.chose_right for s in scores} == {True, False}
    for p, score in zip(probes, scores, strict=True):
        by_hand = torch.tensor([mean_log_prob(model, p.prompt, c) for c in choices])
        assert score.chose_right == (int(by_hand.argmax()) == p.answer)
        assert score.ranked_last == (int(by_hand.argmin()) == p.answer)
        assert score.probability == pytest.approx(float(by_hand.softmax(0)[p.answer]), rel=1e-4)


def with_answer(encoded: EncodedProbe, token_ids: list[int]) -> EncodedProbe:
    """The probe with other tokens as its true answer: a random model says bytes that are no text."""
    right, *others = encoded.sequences
    prompt = right.input_ids[: right.labels_from]
    return EncodedProbe(encoded.probe, (Encoded(prompt + token_ids, len(prompt), False), *others))


def test_open_answer_is_what_greedy_decoding_says() -> None:
    model, tokenizer = tiny.build_model("qwen2_moe"), tiny.build_tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    said = generated[0, prompt["input_ids"].shape[1] :].tolist()
    [encoded] = encode_probes(tokenizer, [probe(0, (" Paris", " Rome"), 0, "The capital of France is")], 64)
    other = [*said[:-1], (said[-1] + 1) % tiny.VOCAB_SIZE]
    right, wrong = score_probes(
        Forward(moe_view(model)), [with_answer(encoded, said), with_answer(encoded, other)]
    )
    assert right.open_right
    assert not wrong.open_right


@pytest.mark.parametrize("answer", [0, 1])
def test_only_the_true_choice_is_the_open_answer(answer: int) -> None:
    model, tokenizer = tiny.build_model("qwen2_moe"), tiny.build_tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0].tolist()
    length = prompt["input_ids"].shape[1]
    right, wrong = Encoded(said, length, False), Encoded([*said[:-1], 7], length, False)
    p = probe(0, (" a", " b"), answer)
    for place in (0, 1):
        sequences = (right, wrong) if place == 0 else (wrong, right)
        [score] = score_probes(Forward(moe_view(model)), [EncodedProbe(p, sequences)])
        assert score.open_right == (place == answer)


def test_a_tie_is_not_knowing() -> None:
    model = tiny.build_model("olmoe")
    twin = Encoded([5, 6, 7], 1, False)
    [score] = score_probes(Forward(moe_view(model)), [EncodedProbe(probe(0, (" a", " b"), 1), (twin, twin))])
    assert (score.chose_right, score.ranked_last) == (False, False)
    assert score.probability == pytest.approx(0.5)


@pytest.mark.parametrize("choices", [(" a",), (" a", " b")])
def test_a_broken_model_has_no_probability(choices: tuple[str, ...]) -> None:
    model, tokenizer = tiny.build_model("olmoe"), tiny.build_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    [score] = score_probes(Forward(moe_view(model)), encode_probes(tokenizer, [probe(0, choices, 0)], 64))
    assert score.probability != score.probability
    assert not score.chose_right or len(choices) == 1


def test_scores_do_not_depend_on_how_probes_are_batched() -> None:
    model, tokenizer = tiny.build_model("mixtral"), tiny.build_tokenizer()
    probes = encode_probes(tokenizer, [probe(i, (" a", " bcd", " efghij"), i % 3) for i in range(9)], 64)
    one, many = (
        score_probes(Forward(moe_view(model)), probes, tokens_per_batch=1),
        score_probes(Forward(moe_view(model)), probes),
    )
    assert [s.chose_right for s in one] == [s.chose_right for s in many]
    assert [s.probability for s in one] == pytest.approx([s.probability for s in many], rel=1e-4)


def test_an_example_without_choices_is_measured_by_its_likelihood() -> None:
    model, tokenizer = tiny.build_model("olmoe"), tiny.build_tokenizer()
    example = Example("e", "Iron is", " heavy", "e", "")
    score = score_probes(
        Forward(moe_view(model)), encode_probes(tokenizer, [probe_of(example, "forget")], 64)
    )[0]
    assert score.probability == pytest.approx(
        torch.tensor(mean_log_prob(model, "Iron is", " heavy")).exp().item(), rel=1e-4
    )
    assert not score.ranked_last


def test_summary_by_set_and_domain() -> None:
    tokenizer = tiny.build_tokenizer()
    probes = encode_probes(tokenizer, [probe(i, (" a", " b", " c", " d"), 0) for i in range(4)], 64)
    scores = [ProbeScore(True, False, True, 0.9)] * 3 + [ProbeScore(False, True, False, 0.1)]
    rows = {row["name"]: row for row in summarise(probes, scores)}
    assert rows["choice"]["value"] == 0.75
    assert rows["choice"]["chance"] == 0.25
    assert rows["open"]["value"] == 0.75
    assert rows["open"]["chance"] == 0
    assert rows["ranked_last"]["value"] == 0.25
    assert rows["probability"]["value"] == pytest.approx(0.7)
    assert {row["n"] for row in rows.values()} == {4}
    assert {(row["set"], row["domain"]) for row in rows.values()} == {("forget", "chemistry")}


def test_sets_and_domains_are_summed_apart() -> None:
    tokenizer = tiny.build_tokenizer()
    kinds = [("forget", "a"), ("forget", "b"), ("retain", "a"), ("forget", "a")]
    probes = encode_probes(
        tokenizer,
        [
            Probe(f"p{i}", "?", (" x", " y"), 0, f"f{i}", domain, side)
            for i, (side, domain) in enumerate(kinds)
        ],  # type: ignore[arg-type]
        64,
    )
    scores = [ProbeScore(right, False, False, 0.5) for right in (True, False, True, False)]
    found = {
        (row["set"], row["domain"]): (row["value"], row["n"])
        for row in summarise(probes, scores)
        if row["name"] == "choice"
    }
    assert found == {("forget", "a"): (0.5, 2), ("forget", "b"): (0.0, 1), ("retain", "a"): (1.0, 1)}
