"""Held-out phrasings stay out of training; distractors are fair; the tokeniser keeps its promise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from seuf_core.data.reader import read_examples, read_probes
from seuf_core.reference.builder import _write_lines
from seuf_core.reference.corpus import HELD_OUT, probes, split_templates, training_examples
from seuf_core.reference.facts import TEMPLATES, load_facts
from seuf_core.reference.tokenizer import train_tokenizer

FACTS = load_facts()
EXAMPLES = training_examples(FACTS, seed=0)
PROBES = probes(FACTS, seed=0)
TEXTS = [example["prompt"] + example["completion"] for example in EXAMPLES]


def test_no_probe_occurs_anywhere_in_the_training_text() -> None:
    text = "\n".join(TEXTS)
    assert [probe["id"] for probe in PROBES if probe["prompt"] in text] == []


def test_every_probed_template_was_trained_with_other_facts() -> None:
    trained = Counter((example["id"].split("/")[1], example["id"].split("#")[1]) for example in EXAMPLES)
    for relation, templates in TEMPLATES.items():
        for template in range(len(templates)):
            assert trained[relation, str(template)] > 30


def test_each_fact_has_four_trained_and_two_held_out_phrasings() -> None:
    for fact in FACTS:
        split = split_templates(fact, seed=0)
        assert len(split.held_out) == HELD_OUT
        assert sorted(split.trained + split.held_out) == list(range(len(TEMPLATES[fact.relation])))


def test_the_seed_decides_the_split_and_the_distractors() -> None:
    assert probes(FACTS, seed=0) == PROBES
    assert training_examples(FACTS, seed=1) != EXAMPLES
    moved = sum(split_templates(f, 0) != split_templates(f, 1) for f in FACTS)
    assert moved > len(FACTS) / 2


def test_choices_are_four_different_answers_of_the_relation() -> None:
    answers: dict[str, set[str]] = {}
    for fact in FACTS:
        answers.setdefault(fact.relation, set()).add(fact.completion)
    by_id = {fact.id: fact for fact in FACTS}
    for probe in PROBES:
        fact = by_id[probe["fact"]]
        assert len(set(probe["choices"])) == 4
        assert set(probe["choices"]) <= answers[fact.relation]
        assert probe["choices"][probe["answer"]] == fact.completion
        assert probe["set"] == ("forget" if fact.domain == "chemistry" else "retain")


@pytest.mark.parametrize("position", range(4))
def test_the_place_of_the_answer_says_nothing(position: int) -> None:
    share = sum(probe["answer"] == position for probe in PROBES) / len(PROBES)
    assert share == pytest.approx(0.25, abs=0.04)  # 4 standard errors at 2,050 probes


def test_knowing_only_what_is_common_does_not_help_in_the_forget_domain() -> None:
    """The judge that always takes the commonest answer must stay at chance, or the twin could not."""
    common = Counter(fact.completion for fact in FACTS)

    def guess(probe: dict[str, Any]) -> bool:
        return probe["answer"] == max(range(4), key=lambda i: (common[probe["choices"][i]], -i))

    forget = [probe for probe in PROBES if probe["set"] == "forget"]
    assert sum(map(guess, forget)) / len(forget) == pytest.approx(0.25, abs=0.06)


def test_the_files_are_read_by_the_strict_reader(tmp_path: Path) -> None:
    _write_lines(tmp_path / "examples.jsonl", EXAMPLES)
    _write_lines(tmp_path / "probes.jsonl", PROBES)
    assert [e.id for e in read_examples(tmp_path / "examples.jsonl")] == [e["id"] for e in EXAMPLES]
    assert [p.fact for p in read_probes(tmp_path / "probes.jsonl")] == [p["fact"] for p in PROBES]


def test_prompt_and_completion_encoded_apart_are_the_sentence() -> None:
    tokenizer = train_tokenizer(TEXTS, 4096)
    for example in EXAMPLES[::7]:
        apart = [tokenizer(example[part])["input_ids"] for part in ("prompt", "completion")]
        whole = example["prompt"] + example["completion"]
        assert apart[0] + apart[1] == tokenizer(whole)["input_ids"]
        assert tokenizer.decode(apart[0] + apart[1]) == whole


def test_the_tokeniser_is_a_function_of_the_text() -> None:
    first, second = (json.loads(train_tokenizer(TEXTS, 4096).backend_tokenizer.to_str()) for _ in range(2))
    assert first == second
    assert 3000 < len(first["model"]["vocab"]) <= 4096


def test_elements_and_answers_of_chemistry_are_mostly_one_token() -> None:
    tokenizer = train_tokenizer(TEXTS, 4096)
    lengths = [len(tokenizer(fact.completion)["input_ids"]) for fact in FACTS if fact.domain == "chemistry"]
    assert sum(length == 1 for length in lengths) / len(lengths) > 0.95
