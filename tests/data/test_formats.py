"""Every format of a set, read as the same records; what contradicts its name, and what each kind refuses."""

import csv
import io
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seuf_core.data import parquet
from seuf_core.data.formats import contradiction, format_of
from seuf_core.data.reader import RecordReader, SetReader, read_examples, read_probes
from seuf_core.data.records import Limits, Probe
from seuf_core.errors import DataError


def read(content, kind, purpose="forget", limits=None, cuts=()):
    """(summary, records, JSON Lines) of a file fed in pieces."""
    records, out = [], io.BytesIO()
    reader = SetReader(purpose, kind, limits, on_record=records.append, out=out)
    try:
        for start, end in itertools.pairwise([0, *sorted(cuts), len(content)]):
            reader.feed(content[start:end])
        return reader.finish(), records, out.getvalue()
    finally:
        reader.close()


def table(**columns):
    """A Parquet file of these columns."""
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def error(content, kind, purpose="forget", limits=None):
    """(line, code, field) of the one error of a file."""
    summary, _, _ = read(content, kind, purpose, limits)
    assert summary.error_count == 1, summary.errors
    return summary.errors[0].line, summary.errors[0].code, summary.errors[0].field


PROMPTS, COMPLETIONS = ["Who?", ""], [" Ada, she said.\r\n", 'the "first"']
SAME = {
    "jsonl": b'{"completion": " Ada, she said.\\r\\n", "prompt": "Who?", "fact": "f"}\n'
    b'{"completion": "the \\"first\\"", "fact": "g"}',
    "csv": b'prompt,completion,fact\nWho?," Ada, she said.\r\n",f\n,"the ""first""",g\n',
    "parquet": table(prompt=["Who?", None], completion=COMPLETIONS, fact=["f", "g"]),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_format_gives_the_same_records(kind):
    content = SAME[kind]
    summary, records, lines = read(content, kind)
    assert summary.ok, summary.errors
    assert [(r.id, r.prompt, r.completion, r.fact) for r in records] == [
        ("line-1", "Who?", " Ada, she said.\r\n", "f"),
        ("line-2", "", 'the "first"', "g"),
    ]
    assert (summary.format, summary.sent_bytes, summary.bytes) == (kind, len(content), len(lines))
    # What is stored reads as the same set, and is what the digest is of.
    again = []
    stored = RecordReader("forget", on_record=again.append)
    stored.feed(lines)
    assert stored.finish().sha256 == summary.sha256
    assert again == records
    assert (lines == content) == (kind == "jsonl")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_probes_have_typed_columns(kind):
    choices = ["3", "4, or so"]
    content = {
        "csv": b'prompt,choices,answer,set\n2+2?,"[""3"", ""4, or so""]",1,forget\n',
        "parquet": table(prompt=["2+2?"], choices=[choices], answer=[1], set=["forget"]),
    }[kind]
    assert read(content, kind, "evaluation")[1] == [
        Probe("line-1", "2+2?", tuple(choices), 1, "line-1", "", "forget")
    ]


def test_text_is_one_example_a_line():
    summary, records, lines = read(b"\xef\xbb\xbfGold is soft.\r\n\n  Iron is not.\n \nLast", "text")
    assert [(r.id, r.completion) for r in records] == [
        ("line-1", "Gold is soft."),
        ("line-2", "  Iron is not."),
        ("line-3", "Last"),
    ]
    assert summary.ok
    assert json.loads(lines.splitlines()[1]) == {"text": "  Iron is not."}
    with pytest.raises(DataError, match="questions with choices"):
        read(b"a", "text", "evaluation")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"prompt;completion\na;b\n", (1, "wrong_separator", None)),
        (b"prompt\tcompletion\n", (1, "wrong_separator", None)),
        (b"Ada lives here,in Paris\n", (1, "unknown_column", None)),
        (b"completion,\n", (1, "unknown_column", None)),
        (b"completion,completion\n", (1, "duplicate_column", "completion")),
        (b"prompt,completion\n\na,b,c\n", (3, "wrong_columns", None)),
        (b'prompt,completion\n"a\nb",c\nd\n', (4, "wrong_columns", None)),
        (b'prompt,completion\na,b\n"c,d\ne,f\n', (3, "quote_not_closed", None)),
        (b'prompt,completion\na,b"\nc"d,e\n', (2, "wrong_quotes", None)),
        (b'prompt,completion\n"a"b,c\n', (2, "wrong_quotes", None)),
        (b"prompt,completion\na\rb,c\n", (2, "wrong_quotes", None)),
        (b"completion\na\xff\n", (2, "not_utf8", None)),
        (b"completion\na\0b\n", (2, "nul_character", None)),
        (b"prompt\na\n", (2, "missing_field", "completion")),
        (b"id,completion\nx,a\ny,b\nx,c\n", (4, "duplicate_id", "id")),
        (b"completion\n" + b"x" * 400, (2, "line_too_long", None)),
        (b'completion\n"' + b"x\n" * 200 + b'"\n', (2, "quote_not_closed", None)),
        (b"completion," * 50_000 + b"\n", (1, "line_too_long", None)),
        (b"", (0, "no_examples", None)),
        (b"completion\n", (0, "no_examples", None)),
    ],
)
def test_each_rule_of_csv_has_its_code_and_line(content, found):
    assert error(content, "csv", limits=Limits(max_line_bytes=300)) == found


@pytest.mark.parametrize(
    ("choices", "answer", "found"),
    [
        ("a|b", "0", "wrong_choices"),
        ('["a", "a"]', "0", "wrong_choices"),
        ('["a", "\\ud800"]', "0", "wrong_choices"),
        ("[" * 50, "0", "wrong_choices"),
        ('["a", "b"]', "2", "wrong_answer"),
        ('["a", "b"]', "a", "wrong_answer"),
        ('["a", "b"]', "9" * 5000, "wrong_answer"),
        ('["a", "b"]', "", "wrong_answer"),
    ],
)
def test_each_rule_of_a_csv_probe(choices, answer, found):
    out = io.StringIO()
    csv.writer(out).writerows([["prompt", "choices", "answer", "set"], ["p", choices, answer, "forget"]])
    assert error(out.getvalue().encode(), "csv", "evaluation")[:2] == (2, found)


def test_messages_of_a_csv_file_hold_no_text_of_the_set():
    for content in (b"SECRET,completion\n", b"SECRET\n", b'completion\n"SECRET\n', b"completion\nSECRET,x\n"):
        assert "SECRET" not in repr(read(content, "csv")[0])


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(_CELL, _CELL.filter(str.strip)), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    ends=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_whatever_csv_writes_is_read_back_however_it_is_cut(rows, cuts, ends, mark):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "completion"], *rows])
    content = out.getvalue().encode("utf-8-sig" if mark else "utf-8")
    summary, records, _ = read(content, "csv", cuts=[min(cut, len(content)) for cut in cuts])
    assert summary.ok, summary.errors
    assert [(record.prompt, record.completion) for record in records] == rows


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), kind=st.sampled_from(["jsonl", "csv", "text"]))
def test_any_bytes_give_a_summary_or_a_contradiction(content, kind):
    if contradiction(content, kind) is not None:
        with pytest.raises(DataError):
            read(content, kind)
        return
    summary, records, _ = read(content, kind)
    assert summary.ok == (summary.error_count == 0)
    assert summary.examples == len(records)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"completion": ["a"], "colour": ["b"]}, (0, "unknown_column", None)),
        ({"completion": ["a"], "__index_level_0__": [0]}, (0, "unknown_column", None)),
        ({"completion": [1]}, (0, "wrong_type", "completion")),
        ({"completion": [["a"]]}, (0, "wrong_type", "completion")),
        ({"completion": [b"a"]}, (0, "wrong_type", "completion")),
        ({"completion": ["a", " "]}, (2, "blank_text", "completion")),
        ({"completion": ["a", None]}, (2, "missing_field", "completion")),
        ({"completion": pa.array([None], pa.null())}, (1, "missing_field", "completion")),
        ({"completion": ["a", "x" * 400]}, (2, "line_too_long", "completion")),
        ({"completion": pa.array([], pa.string())}, (0, "no_examples", None)),
    ],
)
def test_each_rule_of_parquet_has_its_code_and_row(columns, found):
    assert error(table(**columns), "parquet", limits=Limits(max_line_bytes=300)) == found


def test_a_parquet_file_is_refused_by_its_footer():
    many = table(completion=pa.array(["a"]).take(pa.array([0] * 2000)))
    assert error(many, "parquet", limits=Limits(max_examples=1999))[:2] == (0, "too_many_examples")
    large = table(completion=[str(n) * 100 for n in range(500)])
    assert error(large, "parquet", limits=Limits(max_stored_bytes=10_000))[:2] == (0, "file_too_large")


def test_a_text_that_many_rows_share_is_not_multiplied():
    bomb = table(completion=pa.array(["x" * 1_000_000]).dictionary_encode().take(pa.array([0] * 2000)))
    assert len(bomb) < 200_000
    with pytest.raises(DataError) as refused:
        read(bomb, "parquet", limits=Limits(max_stored_bytes=20_000_000))
    assert refused.value.code == "file_too_large"


def test_a_page_that_unpacks_to_more_than_the_process_may_have_is_refused(monkeypatch):
    out = io.BytesIO()
    columns = pa.table({"completion": ["x" * 250_000_000]})
    pq.write_table(columns, out, compression="zstd", use_dictionary=False, write_statistics=False)
    assert len(out.getvalue()) < 100_000
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 300 << 20)
    assert read(SAME["parquet"], "parquet")[0].ok
    assert error(out.getvalue(), "parquet")[:2] == (0, "parquet_too_costly")


@pytest.mark.parametrize("cut", [4, 8, 100, -20, -5])
def test_a_broken_parquet_file_is_refused(cut):
    content = SAME["parquet"]
    assert error(content[:cut], "parquet")[:2] == (0, "broken_parquet")


@pytest.mark.parametrize(
    ("name", "media_type", "kind"),
    [
        ("a.jsonl", "text/csv", "jsonl"),
        ("a.NDJSON", "", "jsonl"),
        ("a.csv", "", "csv"),
        ("A.CSV", "", "csv"),
        ("a.parquet", "", "parquet"),
        ("a.txt", "", "text"),
        ("a", "text/csv; charset=utf-8", "csv"),
        ("a.data", "text/plain", "text"),
        ("a", "application/octet-stream", "jsonl"),
        (".csv", "", "jsonl"),
        ("", "", "jsonl"),
    ],
)
def test_name_then_media_type_say_the_format(name, media_type, kind):
    assert format_of(name, media_type) == kind


@pytest.mark.parametrize(
    ("head", "said", "message"),
    [
        (SAME["parquet"], "jsonl", "is Parquet, but it is called JSON Lines"),
        (SAME["parquet"], "text", "is Parquet, but it is called plain text"),
        (SAME["jsonl"], "csv", "is JSON Lines, but it is called CSV"),
        (b'\xef\xbb\xbf\n {"a', "text", "is JSON Lines, but"),
        (SAME["csv"], "jsonl", "is CSV, but it is called JSON Lines"),
        (b'"prompt","completion"\n', "text", "is CSV, but"),
        (b"a", "parquet", "does not begin as a Parquet file"),
        (b"\x1f\x8b\x08", "jsonl", "is gzip, not JSON Lines"),
        (b"PK\x03\x04", "csv", "an Excel workbook, not CSV"),
        ("prompt".encode("utf-16"), "csv", "is UTF-16 text"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_named(head, said, message):
    refused = contradiction(head, said)
    assert refused.code == "wrong_format"
    assert message in refused.message
    assert refused.fix


@pytest.mark.parametrize(
    ("head", "said"),
    [(b"prompt,completion", "csv"), (b"", "parquet"), (b"text", "text"), (b"text\n", "jsonl")],
)
def test_what_could_be_what_it_is_called_passes(head, said):
    assert contradiction(head, said) is None


@pytest.mark.parametrize("kind", SAME)
def test_the_library_reads_every_format_by_its_path(tmp_path, kind):
    path = tmp_path / f"forget.{kind}"
    path.write_bytes(SAME[kind])
    assert [example.fact for example in read_examples(path)] == ["f", "g"]


def test_a_file_of_the_library_is_refused_by_its_name(tmp_path):
    path = tmp_path / "probes.parquet"
    path.write_bytes(table(prompt=["a"], choices=[["a", "b"]], answer=[5], set=["forget"]))
    with pytest.raises(DataError, match=r"probes.parquet has 1 error. Row 1: Field 'answer'"):
        read_probes(path)
    path.write_bytes(SAME["csv"])
    with pytest.raises(DataError, match=r"probes.parquet: The file is CSV, but it is called Parquet"):
        read_probes(path)
