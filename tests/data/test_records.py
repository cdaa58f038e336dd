"""The rules of forget, retain and evaluation lines, and that how a file is cut into pieces never matters."""

import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seuf_core.data.reader import ERRORS_KEPT, FileSummary, RecordReader, read_examples, read_probes
from seuf_core.data.records import (
    Example,
    Limits,
    Probe,
    Purpose,
    Record,
    split_of,
)
from seuf_core.errors import DataError


def _read(data: bytes, purpose: Purpose = "forget", limits: Limits | None = None, cuts: tuple[int, ...] = ()):
    records: list[Record] = []
    reader = RecordReader(purpose, limits, records.append)
    edges = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        reader.feed(data[start:end])
    return reader.finish(), records


def _line(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _error(line: bytes, purpose: Purpose = "forget", limits: Limits | None = None) -> str:
    """The one error code of a file whose second line is `line`."""
    good = {
        "forget": _line(completion="a"),
        "evaluation": _line(prompt="p", choices=["a", "b"], answer=0, set="retain"),
    }
    summary, records = _read(good[purpose] + line, purpose, limits)
    assert len(records) == summary.examples == 1
    assert [error.line for error in summary.errors] == [2]
    assert not summary.ok
    return summary.errors[0].code


def test_the_three_forms_of_an_example():
    summary, records = _read(
        _line(id="a", prompt="Capital of France?", completion=" Paris", fact="fr", domain="geo")
        + _line(question="And of Peru?", answer="Lima")
        + _line(text="Running text.")
        + _line(completion="No prompt.", id=None, fact=None)
    )
    assert records == [
        Example("a", "Capital of France?", " Paris", "fr", "geo"),
        Example("line-2", "And of Peru?", "Lima", "line-2", ""),
        Example("line-3", "", "Running text.", "line-3", ""),
        Example("line-4", "", "No prompt.", "line-4", ""),
    ]
    # 18 + 6 + 12 + 4 + 13 + 10 = 63 bytes of text, 4 a token, rounded up
    assert (summary.examples, summary.facts, summary.tokens_estimate, summary.ok) == (4, 4, 16, True)


def test_an_alternative_goes_with_every_form():
    summary, records = _read(
        _line(prompt="p", completion="c", alternative="Unknown.")
        + _line(question="q", answer="a", alternative=" not a ")
        + _line(text="t", alternative="s")
        + _line(text="t", alternative=None)
    )
    assert [record.alternative for record in records] == ["Unknown.", " not a ", "s", ""]
    assert records[0] == Example("line-1", "p", "c", "line-1", "", "Unknown.")
    # 2 + 8, 2 + 7, 1 + 1 and 1: 22 bytes of text
    assert (summary.tokens_estimate, summary.ok) == (6, True)
    # A retain set may have it too: one file can serve as either.
    assert _read(_line(text="t", alternative="s"), "retain")[0].ok


def test_a_probe():
    line = _line(id="q", prompt="2+2?", choices=["3", "4"], answer=1, fact="f", domain="d", set="forget")
    assert _read(line, "evaluation")[1] == [Probe("q", "2+2?", ("3", "4"), 1, "f", "d", "forget")]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"completion": "\xff"}', "not_utf8"),
        (b'\xef\xbb\xbf{"completion": "b"}', "not_json"),  # a mark is only one at the start of the file
        (b'{"completion": "b"', "not_json"),
        (b'{"completion": "b"} {}', "not_json"),
        (b'{"completion": "b", "domain": 1' + b"0" * 5000 + b"}", "not_json"),
        (b'["completion"]', "not_an_object"),
        (b'"completion"', "not_an_object"),
        (b'{"completion": "b", "completion": "c"}', "duplicate_key"),
        (b'{"completion": NaN}', "not_a_number"),
        (b'{"completion": -Infinity}', "not_a_number"),
        (b'{"completion": "\\ud83d"}', "half_character"),
        (b'{"\\udc00": "b"}', "half_character"),
        (b'{"completion": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"completion": ' + b"[" * 100_000, "too_deep"),
        (b'{"completion": [[[[[[[["b"]]]]]]]]}', "too_deep"),
        (b'{"completion": [[[[[[["b"]]]]]]]}', "wrong_type"),
        (b'{"completion": " \\n"}', "blank_text"),
        (b'{"completion": 3}', "wrong_type"),
        (b'{"completion": "b", "prompt": 3}', "wrong_type"),
        (b'{"completion": null}', "missing_field"),
        (b'{"prompt": "b"}', "missing_field"),
        (b'{"question": "b"}', "missing_field"),
        (b'{"answer": "b"}', "missing_field"),
        (b'{"question": "b", "answer": 1}', "wrong_type"),
        (b"{}", "missing_field"),
        (b'{"completion": "b", "text": "b"}', "mixed_forms"),
        (b'{"prompt": "b", "text": "b"}', "mixed_forms"),
        (b'{"completion": "b", "colour": "red"}', "unknown_field"),
        (b'{"completion": "b", "alternative": " "}', "blank_text"),
        (b'{"completion": "b", "alternative": ""}', "blank_text"),
        (b'{"completion": "b", "alternative": ["c"]}', "wrong_type"),
        (b'{"completion": "b", "alternative": " b"}', "same_alternative"),
        (b'{"question": "a", "answer": "b", "alternative": "b"}', "same_alternative"),
        (b'{"alternative": "b"}', "missing_field"),
        (b'{"completion": "b", "id": "line-1"}', "duplicate_id"),
        (b'{"completion": "b", "id": 7}', "wrong_type"),
        (b'{"completion": "b", "id": ""}', "blank_text"),
        (b'{"completion": "b", "domain": "a\\u0000"}', "wrong_name"),
        (b'{"completion": "b", "fact": "' + b"f" * 257 + b'"}', "wrong_name"),
        (b"\xa0", "not_utf8"),
        ("\u00a0".encode(), "not_json"),  # white space, but not JSON's
    ],
)
def test_each_rule_of_an_example_has_its_code_and_line(line, code):
    assert _error(line) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"answer": 2}, "wrong_answer"),
        ({"answer": -1}, "wrong_answer"),
        ({"answer": True}, "wrong_answer"),
        ({"answer": "a"}, "wrong_answer"),
        ({"answer": 1.0}, "wrong_answer"),
        ({"choices": ["a"]}, "wrong_choices"),
        ({"choices": "ab"}, "wrong_choices"),
        ({"choices": ["a", "a"]}, "wrong_choices"),
        ({"choices": ["a", " "]}, "blank_text"),
        ({"choices": ["a", 1]}, "wrong_type"),
        ({"choices": [str(i) for i in range(65)]}, "wrong_choices"),
        ({"set": "other"}, "wrong_set"),
        ({"set": None}, "wrong_set"),
        ({"prompt": ""}, "blank_text"),
        ({"prompt": None}, "missing_field"),
        ({"completion": "c"}, "unknown_field"),
        ({"alternative": "c"}, "unknown_field"),
    ],
)
def test_each_rule_of_a_probe_has_its_code_and_line(change, code):
    line = _line(**{"prompt": "p", "choices": ["a", "b"], "answer": 1, "set": "forget", **change})
    assert _error(line, "evaluation") == code


def test_a_byte_order_mark_is_named():
    summary, _ = _read(b"\xef\xbb\xbf" + _line(completion="b"), cuts=(1, 2))
    assert [error.code for error in summary.errors] == ["byte_order_mark"]


def test_a_whole_character_by_escapes_is_read():
    assert _read(b'{"completion": "\\ud83d\\ude00"}')[1][0].completion == "\U0001f600"


def test_line_ends_and_blank_lines():
    data = b'\r\n{"completion": "a"}\r\n \t\n\n  {"completion": "b"}'
    summary, records = _read(data)
    assert [(r.id, r.completion) for r in records] == [("line-2", "a"), ("line-5", "b")]
    assert (summary.lines, summary.bytes, summary.sha256) == (5, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("data", [b"", b"\n\n", b" "])
def test_nothing_is_an_error_of_the_whole_file(data):
    summary, _ = _read(data)
    assert [(error.line, error.code) for error in summary.errors] == [(0, "no_examples")]


def test_an_overlong_line_is_refused_without_being_held():
    limits = Limits(max_line_bytes=100)
    reader = RecordReader("forget", limits)
    reader.feed(b'{"completion": "')
    for _ in range(1000):
        reader.feed(b"x" * 50)
        assert len(reader.lines.held) <= limits.max_line_bytes
    reader.feed(b'"}\n{"completion": "short"}')
    summary = reader.finish()
    assert [(e.line, e.code) for e in summary.errors] == [(1, "line_too_long")]
    assert (summary.examples, summary.lines) == (1, 2)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_overlong_last_line_is_refused_with_or_without_its_newline(end):
    good = _line(completion="a")
    summary, _ = _read(good + b"x" * 101 + end, limits=Limits(max_line_bytes=100), cuts=(len(good),))
    assert [(e.line, e.code) for e in summary.errors] == [(2, "line_too_long")]


def test_brackets_in_a_text_are_not_depth():
    for text in ("[" * 50, '\\" [' * 50, "{[" * 20 + '"'):
        assert _read(_line(completion=text))[1][0].completion == text


def test_a_line_of_exactly_the_limit_passes():
    line = _line(completion="abc").rstrip()
    assert _read(line, limits=Limits(max_line_bytes=len(line)))[0].ok
    assert not _read(line, limits=Limits(max_line_bytes=len(line) - 1))[0].ok


def test_too_many_bytes_stop_the_reading_at_once():
    reader = RecordReader("forget", Limits(max_bytes=10))
    reader.feed(b"x" * 10)
    with pytest.raises(DataError) as caught:
        reader.feed(b"x")
    assert caught.value.code == "file_too_large"


def test_too_many_examples():
    assert _error(_line(completion="b"), limits=Limits(max_examples=1)) == "too_many_examples"


def test_errors_are_all_counted_and_the_first_kept():
    summary, _ = _read(b"{}\n" * (ERRORS_KEPT + 5))
    assert summary.error_count == ERRORS_KEPT + 5
    assert [error.line for error in summary.errors] == list(range(1, ERRORS_KEPT + 1))


def test_after_a_thousand_errors_or_a_million_lines_nothing_more_is_looked_at():
    seen = []
    reader = RecordReader("forget", on_record=seen.append)
    reader.feed(b"{}\n" * 5000)
    reader.feed(_line(completion="a"))
    summary = reader.finish()
    assert (summary.error_count, summary.lines, seen) == (1000, 1000, [])
    assert summary.bytes == 15_000 + len(_line(completion="a"))
    summary, _ = _read(b"\n" * 12 + _line(completion="a"), limits=Limits(max_lines=10))
    assert [(error.line, error.code) for error in summary.errors] == [(11, "too_many_lines")]


@pytest.mark.parametrize(
    "line", [b'{"completion": "SECRET", "x": 1}', b'{"completion": "SECRET"', b'{"fact": "SECRET"}']
)
def test_messages_hold_no_text_of_the_set(line):
    assert "SECRET" not in repr(_read(line)[0])


_PIECES = st.sampled_from(
    [
        b'{"completion": "a"}',
        b'{"text": "\xc3\xa9"}',
        b"\n",
        b"\r\n",
        b" ",
        b"\xef\xbb\xbf",
        b"\xff",
        b"{",
        b'"',
        b"x" * 40,
    ]
)


@settings(max_examples=300, deadline=None)
@given(data=st.lists(_PIECES, max_size=12).map(b"".join), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_how_a_file_is_cut_does_not_matter(data, cuts):
    limits = Limits(max_line_bytes=60, max_examples=3)
    cut = _read(data, limits=limits, cuts=tuple(min(at, len(data)) for at in cuts))
    assert cut == _read(data, limits=limits)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), _TEXT), min_size=1, max_size=5
    ),
    ascii_=st.booleans(),
)
def test_whatever_json_writes_is_read_back(texts, ascii_):
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii_).encode() for p, c in texts]
    summary, records = _read(b"\n".join(lines))
    assert summary.ok
    assert [(record.prompt, record.completion) for record in records] == texts
    assert summary.tokens_estimate == -(-sum(len((p + c).encode()) for p, c in texts) // 4)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_summary(data):
    summary, records = _read(data)
    assert isinstance(summary, FileSummary)
    assert summary.examples == len(records)
    assert summary.ok == (summary.examples > 0 and summary.error_count == 0)


def test_files_are_read_or_refused_with_lines(tmp_path):
    path = tmp_path / "forget.jsonl"
    path.write_bytes(_line(completion="a") + b"{}\n" + b"[]\n")
    with pytest.raises(DataError, match=r"forget.jsonl has 2 errors. Line 2: .*Line 3: ") as caught:
        read_examples(path)
    assert caught.value.code == "invalid_set"
    path.write_bytes(_line(completion="a"))
    assert [example.completion for example in read_examples(path)] == ["a"]
    path.write_bytes(_line(prompt="p", choices=["a", "b"], answer=0, set="retain"))
    assert [probe.set for probe in read_probes(path)] == ["retain"]
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path)
    assert caught.value.code == "set_not_found"


def test_splits_are_fixed_seeded_and_of_the_right_size():
    facts = [f"fact-{i}" for i in range(5000)]
    first = [split_of(fact, 0) for fact in facts]
    assert first == [split_of(fact, 0) for fact in facts]
    assert first != [split_of(fact, 1) for fact in facts]
    for name, share in zip(("train", "selection", "test"), (0.5, 0.2, 0.3), strict=True):
        assert abs(first.count(name) / 5000 - share) < 0.02  # three standard errors of .5 at n = 5000
    # From `printf 0:a | sha256sum` and so on: .617, .876, .742, .491. A new rule would train on test facts.
    assert [split_of(fact, 0) for fact in "abcd"] == ["selection", "test", "test", "train"]
    assert {split_of(fact, 0, (0, 0, 1)) for fact in facts} == {"test"}
    with pytest.raises(ValueError, match="sum to 1"):
        split_of("a", 0, (0.5, 0.5, 0.5))
