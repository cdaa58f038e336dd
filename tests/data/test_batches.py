"""Labels worked by hand, cuts, padding, and an order that needs no memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seuf_core.data.batches import (
    Encoded,
    batch_indices,
    collate,
    encode_alternatives,
    encode_examples,
    encode_pair,
    length_bucketed,
)
from seuf_core.data.records import Example
from seuf_core.errors import DataError
from tests import tiny

BYTES = tiny.build_tokenizer()  # one token a byte, nothing in front


def _words(*, bos: bool = False, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Words as tokens; with prefix_space as sentencepiece has them: "▁" before each word and the text."""
    mark = "▁" if prefix_space else ""
    pieces = ["<s>", "▁", *(mark + word for word in ("The", "sky", "is", "blue"))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prefix_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _shown(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> tuple[list[str], list[str]]:
    """Tokens that are prompt, and tokens that are labels."""
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    return tokens[: encoded.labels_from], tokens[encoded.labels_from :]


def test_labels_of_prompt_and_completion():
    encoded = encode_pair(BYTES, "ab", " cd", 64)
    assert _shown(BYTES, encoded) == (["a", "b"], ["Ġ", "c", "d"])
    batch = collate([encoded, encode_pair(BYTES, "", "xy", 64)], pad_token_id=0)
    a, b, space, c, d, x, y = BYTES("ab cdxy")["input_ids"]
    assert batch.input_ids.tolist() == [[a, b, space, c, d], [x, y, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # Running text: nothing stands before x, so it cannot be predicted.
    assert batch.labels.tolist() == [[-100, -100, space, c, d], [-100, y, -100, -100, -100]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_a_pad_token_inside_a_text_is_a_label_all_the_same():
    batch = collate([Encoded([5, 7, 7], 1, False), Encoded([5, 7], 1, False)], pad_token_id=7)
    assert batch.labels.tolist() == [[-100, 7, 7], [-100, 7, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_tokenizer_s_own_bos_stands_in_front_and_makes_the_first_word_a_label():
    words = _words(bos=True)
    assert _shown(words, encode_pair(words, "", "sky is", 9)) == (["<s>"], ["sky", "is"])
    assert _shown(words, encode_pair(words, "The sky", "is", 9)) == (["<s>", "The", "sky"], ["is"])


def test_a_sentencepiece_completion_gets_no_second_space():
    words = _words(prefix_space=True)
    # By itself " blue" would be "▁", "▁blue".
    assert words.tokenize(" blue") == ["▁", "▁blue"]
    assert _shown(words, encode_pair(words, "The sky is", " blue", 9)) == (["▁The", "▁sky", "▁is"], ["▁blue"])


def test_a_token_across_the_boundary_does_not_move_it():
    tokenizer = Tokenizer(models.BPE({"青": 0, "い": 1, "青い": 2, "空": 3}, [("青", "い")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert merging.tokenize("空青い空") == ["空", "青い", "空"]
    assert _shown(merging, encode_pair(merging, "空青", "い空", 9)) == (["空", "青"], ["い", "空"])


@pytest.mark.parametrize(
    ("prompt", "completion", "labels"),
    [
        ("is", "Paris", " Paris"),
        ("is", " Paris", " Paris"),
        ("is ", "Paris", "Paris"),
        ("is\n", "Paris", "Paris"),
        ("", "Paris", "aris"),
        ("首都は", "パリ", "パリ"),
        ("首都是", "Paris", "Paris"),
        ("Ça", "été", " été"),
    ],
)
def test_words_do_not_run_together(prompt, completion, labels):
    encoded = encode_pair(BYTES, prompt, completion, 64)
    assert BYTES.decode(encoded.input_ids[encoded.labels_from :]) == labels


@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "kept", "labels", "truncated"),
    [
        ("abcdef", " xy", 9, "abcdef", " xy", False),
        ("abcdef", " xy", 8, "bcdef", " xy", True),  # the prompt's start goes first
        ("abcdef", " xy", 4, "f", " xy", True),
        ("abcdef", " wxyz", 4, "f", " wx", True),  # then the completion's end; one prompt token stays
        ("", "abcdef", 3, "a", "bc", True),
    ],
)
def test_what_is_cut(prompt, completion, max_length, kept, labels, truncated):
    encoded = encode_pair(BYTES, prompt, completion, max_length)
    assert len(encoded.input_ids) <= max_length
    assert BYTES.decode(encoded.input_ids[: encoded.labels_from]) == kept
    assert BYTES.decode(encoded.input_ids[encoded.labels_from :]) == labels
    assert encoded.truncated == truncated


def test_a_cut_keeps_the_bos():
    words = _words(bos=True)
    assert _shown(words, encode_pair(words, "The sky is", "blue", 3)) == (["<s>", "is"], ["blue"])
    assert _shown(words, encode_pair(words, "", "The sky is", 3)) == (["<s>"], ["The", "sky"])


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(prompt=_TEXT | st.just(""), completion=_TEXT, max_length=st.integers(2, 40))
def test_labels_are_never_prompt_and_never_missing(prompt, completion, max_length):
    if not prompt and len(completion.encode()) < 2:
        return
    encoded = encode_pair(BYTES, prompt, completion, max_length)
    assert 1 <= encoded.labels_from < len(encoded.input_ids) <= max_length
    if not encoded.truncated:
        whole, labels = BYTES(completion)["input_ids"], encoded.input_ids[encoded.labels_from :]
        if prompt:
            assert encoded.input_ids[: encoded.labels_from] == BYTES(prompt)["input_ids"]
            assert labels in (whole, BYTES(" ")["input_ids"] + whole)
        else:
            assert (encoded.input_ids, labels) == (whole, whole[1:])


def test_a_text_without_a_label_names_its_place():
    examples = [Example("a", "", "fine", "a", ""), Example("b", "", "x", "b", "")]
    with pytest.raises(DataError, match="Text 2 of 2") as caught:
        encode_examples(BYTES, examples, 8)
    assert caught.value.code == "no_label_tokens"
    assert encode_examples(BYTES, [], 8) == []
    assert len(encode_examples(BYTES, examples[:1], 8)) == 1


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40), budget=st.integers(1, 100))
def test_buckets_hold_every_row_once_within_the_budget(lengths, budget):
    rows = [Encoded([i + 1] * length, 1, False) for i, length in enumerate(lengths)]
    batches = list(length_bucketed(rows, budget, pad_token_id=0))
    seen = []
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.input_ids) == 1
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            seen.append((int(ids[0]) - 1, int(mask.sum())))
            assert ids[mask == 0].eq(0).all()
    assert sorted(seen) == list(enumerate(lengths))
    assert [length for _, length in seen] == sorted(lengths)


@settings(max_examples=100, deadline=None)
@given(num_examples=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_every_epoch_sees_every_example_once(num_examples, batch_size, seed):
    steps = -(-3 * num_examples // batch_size)
    stream = [i for step in range(steps) for i in batch_indices(num_examples, batch_size, seed, step)]
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(seed: int) -> list[list[int]]:
        return [batch_indices(50, 10, seed, step) for step in range(10)]

    first = order(0)
    torch.manual_seed(123)
    torch.rand(10)
    backwards = [batch_indices(50, 10, 0, step) for step in reversed(range(10))][::-1]
    assert first == backwards
    assert first != order(1)
    assert first[:5] != first[5:]  # the second epoch has an order of its own


def letters(text: str) -> Example:
    return Example("t", "", text, "t", "")


def bytes_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny.build_tokenizer()
    template = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def test_a_long_text_becomes_windows_in_which_every_token_is_a_label_once() -> None:
    """abcdefghij in windows of 4: abcd, defg, ghij; d and g are context the second time."""
    windows = encode_examples(BYTES, [letters("abcdefghij")], 4)
    assert [BYTES.decode(w.input_ids) for w in windows] == ["abcd", "defg", "ghij"]
    assert "".join(BYTES.decode(w.input_ids[w.labels_from :]) for w in windows) == "bcdefghij"
    assert not any(w.truncated for w in windows)


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_any_length_lose_and_repeat_no_label(length: int, bos: bool) -> None:
    tokenizer = bytes_with_bos() if bos else BYTES
    text = "abcdefghijklm"[:length]
    windows = encode_examples(tokenizer, [letters(text)], 5)
    labels = "".join(tokenizer.decode(w.input_ids[w.labels_from :]) for w in windows)
    assert labels == (text if bos else text[1:])
    assert all(len(w.input_ids) <= 5 for w in windows)
    assert all(w.input_ids[0] == tokenizer.bos_token_id for w in windows) is bos


def test_a_prompt_with_a_long_answer_stays_one_sequence() -> None:
    example = Example("p", "q:", "abcdefghij", "p", "")
    [encoded] = encode_examples(BYTES, [example], 6)
    assert encoded.truncated


def test_an_alternative_stands_after_the_same_prompt() -> None:
    """Its own where the example has one, else the default; the labels are the alternative."""
    examples = [Example("a", "sky:", "blue", "a", "", "grey"), Example("b", "sun:", "hot", "b", "")]
    found = encode_alternatives(BYTES, examples, 32, "unknown")
    assert [BYTES.decode(row.input_ids) for row in found] == ["sky: grey", "sun: unknown"]
    for row, forget in zip(found, encode_examples(BYTES, examples, 32), strict=True):
        assert row.labels_from == forget.labels_from
        assert row.input_ids[: row.labels_from] == forget.input_ids[: forget.labels_from]


def test_there_is_an_alternative_for_every_piece_of_a_running_text() -> None:
    """Alone, as the text itself has no prompt: three pieces of four tokens, then a text of one."""
    examples = [letters("abcdefghij"), Example("b", "", "xyz", "b", "", "no")]
    found = encode_alternatives(BYTES, examples, 4, "gone")
    assert [BYTES.decode(row.input_ids) for row in found] == ["gone", "gone", "gone", "no"]
    assert len(found) == len(encode_examples(BYTES, examples, 4))
    assert encode_alternatives(BYTES, [], 4, "gone") == []


def test_an_alternative_without_a_token_to_predict_is_an_error() -> None:
    with pytest.raises(DataError, match="Text 2 of 2"):
        encode_alternatives(BYTES, [letters("abc"), Example("b", "", "xyz", "b", "", "n")], 8, "gone")
