"""The files of a benchmark's job hold the sequences that its steps see."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.setting import Labels, encoded, texts, training_data, write_texts
from benchmarks.shapes import tokenizer
from seuf_core.data.batches import encode_examples
from seuf_core.data.reader import read_examples

VOCABULARY, NUMBER, LENGTH = 64, 5, 12


@pytest.mark.parametrize("labels", get_args(Labels))
def test_a_written_set_is_read_as_the_same_sequences(tmp_path: Path, labels: Labels) -> None:
    path = write_texts(tmp_path / "set.jsonl", texts(VOCABULARY, NUMBER, LENGTH, seed=1), labels)
    read = encode_examples(tokenizer(VOCABULARY), read_examples(path), LENGTH)
    assert read == encoded(VOCABULARY, NUMBER, LENGTH, seed=1, labels=labels)


def test_the_two_settings_have_the_same_tokens_and_other_labels() -> None:
    running, answers = (training_data(VOCABULARY, NUMBER, LENGTH, labels) for labels in ("texts", "answers"))
    for text, answer in zip(
        [*running.forget, *running.retain], [*answers.forget, *answers.retain], strict=True
    ):
        assert text.input_ids == answer.input_ids
        assert (text.labels_from, answer.labels_from) == (1, LENGTH // 2)
    assert running.forget != running.retain
