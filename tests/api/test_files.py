"""Uploads: what is accepted, what is refused and how, and that nothing of a refused file stays."""

import hashlib
import io
import json
import socket
import time
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from store.audit import Audit
from tests.serving import lines_of, on_sqlite

GOOD = '{"id": "a", "prompt": "Who?", "completion": " Ada."}'


def post(tenant, content, purpose="forget", name="forget.jsonl"):
    return tenant.http.post("/files", data={"purpose": purpose}, files={"file": (name, content)})


def stored(tenant):
    folder = tenant.served.artefacts.path("files")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("purpose", ["forget", "retain", "evaluation"])
def test_a_good_file_is_described_and_kept_as_it_came(tenant, purpose):
    content = ("\r\n".join(lines_of(purpose, 5)) + "\r\n").encode()
    answer = post(tenant, content, purpose, "../../odd\\name.jsonl")
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (file["bytes"], file["examples"], file["purpose"]) == (len(content), 5, purpose)
    assert file["tokens_estimate"] > 0
    assert file["filename"] == "name.jsonl"
    assert file["created_at"].endswith("Z")
    assert answer.headers["Location"] == f"/files/{file['id']}"
    assert tenant.http.get(answer.headers["Location"]).json() == file
    with tenant.served.artefacts.open_read(f"files/{file['id']}.jsonl") as kept:
        assert kept.read() == content


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a\0b\x1b[31m.jsonl", "ab[31m.jsonl"), ("..", ".."), ("x/", "upload.jsonl"), ("é" * 300, "é" * 255)],
)
def test_a_file_name_is_only_ever_shown(tenant, given, shown):
    answer = tenant.http.post(
        "/files",
        content=b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="'
        + given.encode()
        + b'"\r\n\r\n'
        + GOOD.encode()
        + b"\r\n--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["filename"] == shown


def test_purpose_may_come_after_the_file(tenant):
    parts = [("file", ("f.jsonl", GOOD.encode())), ("purpose", (None, b"retain"))]
    answer = tenant.http.post("/files", files=parts)
    assert answer.status_code == 201, answer.text
    assert answer.json()["purpose"] == "retain"
    bad = [("file", ("f.jsonl", b"{")), ("purpose", (None, b"retain"))]
    assert tenant.http.post("/files", files=bad).json()["errors"][0]["line"] == 1


BAD_CONTENT = {
    "broken line": (f"{GOOD}\n{{broken\n", 422, "invalid_examples", "not_json", 2),
    "no example": ("\n  \n", 422, "invalid_examples", "no_examples", None),
    "empty file": ("", 422, "invalid_examples", "no_examples", None),
    "duplicate id": (f"{GOOD}\n\n{GOOD}\n", 422, "invalid_examples", "duplicate_id", 3),
    "bad UTF-8": (GOOD.encode() + b'\n{"text": "\xff\xfe"}', 422, "invalid_examples", "not_utf8", 2),
    "unknown field": ('{"text": "x", "label": 1}', 422, "invalid_examples", "unknown_field", 1),
    "over the limit": (f"{GOOD}\n" * 50_000, 413, "file_too_large", "file_too_large", None),
}


@on_sqlite
@pytest.mark.parametrize("case", BAD_CONTENT)
def test_a_bad_file_is_refused_with_its_line_and_nothing_is_kept(tenant, case):
    content, status, code, first, line = BAD_CONTENT[case]
    before = stored(tenant)
    answer = post(tenant, content)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), answer.text
    assert problem["fix"]
    assert problem["errors"][0]["pointer"] == "/file"
    assert problem["errors"][0]["code"] == first
    assert problem["errors"][0].get("line") == line
    assert stored(tenant) == before
    assert tenant.http.get("/files").json()["data"] == []


@on_sqlite
def test_the_cap_holds_when_no_length_is_declared(tenant):
    boundary = "b0undary"

    def body():
        yield f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n'.encode()
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        yield head.encode()
        for _ in range(40):
            yield (GOOD + "\n").encode() * 2000

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    answer = tenant.http.post("/files", content=body(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")


BAD_FORMS = {
    "not multipart": ({"content": b"{}"}, 415, "not_multipart", None),
    "no purpose": ({"files": {"file": ("f", GOOD)}}, 422, "missing", "/purpose"),
    "no file": ({"files": {"purpose": (None, "forget")}}, 422, "missing", "/file"),
    "unknown purpose": (
        {"data": {"purpose": "erase"}, "files": {"file": ("f", GOOD)}},
        422,
        "unknown_purpose",
        "/purpose",
    ),
    "unknown part": (
        {"data": {"purpose": "forget", "model": "x"}, "files": {"file": ("f", GOOD)}},
        422,
        "extra_forbidden",
        "/model",
    ),
    "file twice": (
        {"data": {"purpose": "forget"}, "files": [("file", ("f", GOOD)), ("file", ("g", GOOD))]},
        422,
        "duplicate_part",
        "/file",
    ),
    "cut off": (
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfor',
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        400,
        "broken_multipart",
        None,
    ),
    "garbage": (
        {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "broken_multipart",
        None,
    ),
}


@on_sqlite
@pytest.mark.parametrize("case", BAD_FORMS)
def test_a_bad_form_is_refused(tenant, case):
    request, status, code, pointer = BAD_FORMS[case]
    answer = tenant.http.post("/files", **request)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["fix"]
    if pointer is not None:
        assert answer.json()["errors"][0]["pointer"] == pointer


def test_listing_pages_through_everything_once(tenant):
    ids = [tenant.upload("forget", [GOOD])["id"] for _ in range(7)]
    other = tenant.upload("retain", [GOOD])["id"]
    seen, cursor = [], None
    while True:
        page = tenant.http.get("/files", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        seen += [file["id"] for file in page["data"]]
        cursor = page["next"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert seen == [other, *reversed(ids)]
    only = tenant.http.get("/files", params={"purpose": "retain"}).json()
    assert [file["id"] for file in only["data"]] == [other]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("size=3", "size"), ("cursor=%21%21", "cursor")],
)
def test_a_bad_query_names_its_parameter(tenant, query, parameter):
    answer = tenant.http.get(f"/files?{query}")
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["parameter"] == parameter


def test_deleting_takes_the_bytes_and_leaves_a_tombstone(tenant, tiny_model):
    file = tenant.upload("forget")
    assert f"{file['id']}.jsonl" in stored(tenant)
    assert tenant.http.delete(f"/files/{file['id']}").status_code == 204
    assert f"{file['id']}.jsonl" not in stored(tenant)
    for answer in (tenant.http.get(f"/files/{file['id']}"), tenant.http.delete(f"/files/{file['id']}")):
        assert (answer.status_code, answer.json()["code"]) == (410, "file_deleted")
        assert "was deleted at 20" in answer.json()["detail"]
    assert tenant.http.get("/files").json()["data"] == []
    tenant.register(tiny_model)
    for path in ("/jobs", "/jobs/estimate"):
        body = {
            "model": "tiny",
            "forget_set": {"file": file["id"]},
            "retain_set": {"examples": [{"text": "x"}]},
        }
        answer = tenant.http.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "file_deleted"), answer.text
        assert answer.json()["errors"][0]["pointer"] == "/forget_set/file"
    with tenant.served.database.read() as session:
        done = [row.what for row in Audit(session, tenant.name).list() if row.object == file["id"]]
    assert done == ["file.create", "file.delete"]


def parquet():
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["Who?"], "completion": [" Ada."]}), out)
    return out.getvalue()


FORMATS = {
    "csv": (b"\xef\xbb\xbfprompt,completion\r\nWho?, Ada.\r\n", "f.csv", {}),
    "parquet": (parquet(), "f.parquet", {}),
    "text": (b" Ada.\n", "f.txt", {}),
    "jsonl": (GOOD.encode(), "f.jsonl", {}),
    "csv by name of format": (b"completion\n Ada.\n", "f", {"format": "csv"}),
    "csv by its media type": (b"completion\n Ada.\n", "f", "text/csv"),
}


@on_sqlite
@pytest.mark.parametrize("case", FORMATS)
def test_every_format_is_stored_as_json_lines(tenant, case):
    content, name, how = FORMATS[case]
    kind = (how["format"] if isinstance(how, dict) and how else case).split()[0]
    data = {"purpose": "forget", **(how if isinstance(how, dict) else {})}
    sent = (name, content, how) if isinstance(how, str) else (name, content)
    answer = tenant.http.post("/files", data=data, files={"file": sent})
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert (file["format"], file["examples"]) == (kind, 1)
    assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    with tenant.served.artefacts.open_read(f"files/{file['id']}.jsonl") as kept:
        lines = kept.read()
    assert (file["stored_bytes"], file["stored_sha256"]) == (len(lines), hashlib.sha256(lines).hexdigest())
    assert " Ada." in json.loads(lines).values()
    assert (lines == content) == (kind == "jsonl")


BAD_FORMATS = {
    "parquet called jsonl": (parquet(), "f.jsonl", {}, "wrong_format", "/file"),
    "csv called jsonl": (b"prompt,completion\na,b\n", "f.jsonl", {}, "wrong_format", "/file"),
    "unknown format": (b"a", "f", {"format": "xml"}, "unknown_format", "/format"),
    "text without choices": (b"a", "f.txt", {"purpose": "evaluation"}, "text_without_choices", "/file"),
}


@on_sqlite
@pytest.mark.parametrize("case", BAD_FORMATS)
def test_a_wrong_format_is_named(tenant, case):
    content, name, fields, code, pointer = BAD_FORMATS[case]
    answer = tenant.http.post("/files", data={"purpose": "forget", **fields}, files={"file": (name, content)})
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert answer.json()["fix"]


@on_sqlite
def test_a_broken_row_names_its_line_and_column(tenant):
    answer = post(tenant, b'prompt,completion\n"a\nb",c\nd, \n', name="f.csv").json()
    assert answer["detail"].startswith("line 4: ")
    assert (answer["errors"][0]["line"], answer["errors"][0]["field"]) == (4, "completion")
    out = io.BytesIO()
    pq.write_table(pa.table({"completion": ["a", " "]}), out)
    assert post(tenant, out.getvalue(), name="f.parquet").json()["detail"].startswith("row 2: ")


@on_sqlite
def test_format_after_the_file_is_refused(tenant):
    parts = [("purpose", (None, b"forget")), ("file", ("f.csv", b"completion\na\n")), ("format", (None, b"csv"))]
    answer = tenant.http.post("/files", files=parts)
    assert (answer.status_code, answer.json()["code"]) == (422, "part_order")


@on_sqlite
def test_a_file_over_the_cap_is_sent_to_parts(tenant):
    answer = post(tenant, b"x" * (3 << 20))
    assert answer.status_code == 413
    assert "POST /uploads" in answer.json()["fix"]


@on_sqlite
@pytest.mark.parametrize(
    ("given", "code", "pointer"),
    [
        ({"content": "completion\na\n", "format": "csv"}, None, None),
        ({"content": "a\n\nb", "format": "text"}, None, None),
        ({"content": GOOD}, None, None),
        ({"content": "completion\na,b\n", "format": "csv"}, "invalid_examples", "/forget_set/content"),
        ({"content": GOOD, "format": "csv"}, "wrong_format", "/forget_set/content"),
        ({"content": "a\n" * 600_000, "format": "text"}, "examples_too_large", "/forget_set/content"),
        ({"content": ('"' * 20 + "\n") * 48_000, "format": "text"}, "examples_too_large", "/forget_set/content"),
        ({"content": "a", "format": "parquet"}, "invalid_request", "/forget_set/format"),
        ({"examples": [{"text": "a"}], "format": "csv"}, "invalid_request", "/forget_set"),
        ({"examples": [{"text": "a"}], "content": "a"}, "invalid_request", "/forget_set"),
    ],
)
def test_a_set_inside_a_job_may_be_the_text_of_a_file(tenant, tiny_model, given, code, pointer):
    tenant.register(tiny_model)
    body = {"model": "tiny", "forget_set": given, "retain_set": {"examples": [{"text": "x"}]}}
    answer = tenant.http.post("/jobs", json=body)
    if code is None:
        assert answer.status_code == 202, answer.text
        file = tenant.http.get(f"/files/{answer.json()['forget_set']}").json()
        assert file["format"] == given.get("format", "jsonl")
        return
    assert answer.json()["code"] == code, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_a_file_that_a_job_waits_for_stays(tenant, tiny_model):
    job = tenant.submit(tiny_model)
    answer = tenant.http.delete(f"/files/{job['forget_set']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "file_in_use")
    tenant.http.post(f"/jobs/{job['id']}/cancel")
    assert tenant.http.delete(f"/files/{job['forget_set']}").status_code == 204
    assert tenant.http.get(f"/jobs/{job['id']}").json()["forget_set"] == job["forget_set"]


@on_sqlite
def test_an_upload_that_is_cut_off_leaves_nothing_and_no_crash_in_the_log(tenant, caplog):
    before = stored(tenant)
    address = urlsplit(tenant.served.url)
    head = (
        "POST /files HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        f"Authorization: Bearer {tenant.key}\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    )
    uploads = tenant.served.settings.data_dir / "uploads"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall((head + GOOD).encode())
        time.sleep(0.3)
    time.sleep(0.3)
    assert tenant.http.get("/files").json()["data"] == []
    assert stored(tenant) == before
    assert list(uploads.iterdir()) == []
    assert "crashed" not in caplog.text
