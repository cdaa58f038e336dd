"""Uploads in parts: in any order, again and again, checked when they are whole; and given up."""

import base64
import hashlib
import threading
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import update

from store.audit import Audit
from store.tables import Upload, now
from tests.serving import lines_of, on_sqlite
from worker.uploads import expire_uploads

CONTENT = ("\n".join(lines_of("forget", 300)) + "\n").encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = [CONTENT[:7000], CONTENT[7000:14000], CONTENT[14000:]]


def begin(tenant, **fields):
    body = {"purpose": "forget", "filename": "forget.jsonl", **fields}
    answer = tenant.http.post("/uploads", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def put(tenant, upload, number, content, **headers):
    return tenant.http.put(f"/uploads/{upload}/parts/{number}", content=content, headers=headers)


def complete(tenant, upload):
    return tenant.http.post(f"/uploads/{upload}/complete")


def kept(tenant, upload):
    """What lies in the storage for an upload."""
    folder = tenant.served.artefacts.path(f"uploads/{upload}")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def code(answer):
    return answer.status_code, answer.json()["code"]


def test_parts_in_any_order_become_the_file(tenant):
    upload = begin(tenant, bytes=len(CONTENT), sha256=SHA256)
    for number in (3, 1, 2):
        answer = put(tenant, upload, number, PARTS[number - 1])
        assert answer.status_code == 201, answer.text
        assert answer.json()["sha256"] == hashlib.sha256(PARTS[number - 1]).hexdigest()
    shown = tenant.http.get(f"/uploads/{upload}").json()
    assert [part["number"] for part in shown["parts"]] == [1, 2, 3]
    assert (shown["received_bytes"], shown["file"], shown["format"]) == (len(CONTENT), None, "jsonl")
    assert tenant.http.get("/uploads").json()["data"] == [shown]
    answer = complete(tenant, upload)
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert (file["sha256"], file["bytes"], file["examples"]) == (SHA256, len(CONTENT), 300)
    assert answer.headers["Location"] == f"/files/{file['id']}"
    with tenant.served.artefacts.open_read(f"files/{file['id']}.jsonl") as stored:
        assert stored.read() == CONTENT
    assert kept(tenant, upload) == []
    assert complete(tenant, upload).json() == file
    assert tenant.http.get(f"/uploads/{upload}").json()["file"] == file["id"]
    assert tenant.http.get("/uploads").json()["data"] == []
    assert code(put(tenant, upload, 1, b"x")) == (409, "upload_complete")
    with tenant.served.database.read() as session:
        done = [row.what for row in Audit(session, tenant.name).list()]
    assert done == ["upload.create", *["upload.part"] * 3, "upload.complete", "file.create"]


def test_the_same_part_again_changes_nothing_and_another_takes_its_place(tenant):
    upload = begin(tenant)
    assert put(tenant, upload, 1, b"wrong").status_code == 201
    assert put(tenant, upload, 1, b"wrong").status_code == 200
    assert len(kept(tenant, upload)) == 1
    assert put(tenant, upload, 1, CONTENT).status_code == 200
    assert len(kept(tenant, upload)) == 1
    assert complete(tenant, upload).json()["sha256"] == SHA256


def test_a_broken_whole_names_its_line_and_can_be_put_right(tenant):
    upload = begin(tenant)
    bad = CONTENT.replace(b'"id"', b'"ib"', 1)
    put(tenant, upload, 1, PARTS[0])
    put(tenant, upload, 2, bad)
    answer = complete(tenant, upload)
    assert code(answer) == (422, "invalid_examples")
    assert answer.json()["errors"][0]["line"]
    put(tenant, upload, 2, CONTENT[7000:])
    assert complete(tenant, upload).status_code == 201


def digest(content, algorithm="sha-256"):
    return f"{algorithm}=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@on_sqlite
@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
def test_a_digest_is_checked(tenant, name):
    upload = begin(tenant)
    assert put(tenant, upload, 1, b"abc", **{name: digest(b"abc")}).status_code == 201
    assert put(tenant, upload, 2, b"abc", **{name: "unixsum=:MQ==:, " + digest(b"abc")}).status_code == 201
    for wrong, said in (
        (digest(b"abd"), "digest_mismatch"),
        ("sha-256=:!:", "unknown_digest"),
        ("sha-256=:abc:", "digest_mismatch"),
        ("", "unknown_digest"),
        (digest(b"abc", "sha-512"), "unknown_digest"),
    ):
        answer = put(tenant, upload, 3, b"abc", **{name: wrong})
        assert code(answer) == (422, said), wrong
        assert answer.json()["errors"][0]["parameter"] == name
    assert len(kept(tenant, upload)) == 2


@on_sqlite
def test_what_is_not_whole_or_not_what_was_announced_is_refused(tenant):
    upload = begin(tenant, bytes=len(CONTENT))
    assert code(complete(tenant, upload)) == (409, "upload_incomplete")
    put(tenant, upload, 2, PARTS[1])
    assert "Part 1 is missing" in complete(tenant, upload).json()["detail"]
    put(tenant, upload, 1, PARTS[0])
    assert "were announced" in complete(tenant, upload).json()["detail"]
    assert code(put(tenant, upload, 3, CONTENT)) == (413, "file_too_large")
    assert len(kept(tenant, upload)) == 2
    other = begin(tenant, sha256="0" * 64)
    put(tenant, other, 1, CONTENT)
    assert code(complete(tenant, other)) == (422, "digest_mismatch")


@on_sqlite
@pytest.mark.parametrize(
    ("body", "said", "pointer"),
    [
        ({"purpose": "erase"}, "invalid_request", "/purpose"),
        ({"filename": ""}, "invalid_request", "/filename"),
        ({"filename": "a\0b"}, "invalid_request", "/filename"),
        ({"bytes": 0}, "invalid_request", "/bytes"),
        ({"bytes": -5}, "invalid_request", "/bytes"),
        ({"bytes": 1 << 60}, "file_too_large", "/bytes"),
        ({"bytes": 1 << 80}, "file_too_large", "/bytes"),
        ({"sha256": "A" * 64}, "invalid_request", "/sha256"),
        ({"format": "xml"}, "invalid_request", "/format"),
        ({"purpose": "evaluation", "filename": "a.txt"}, "text_without_choices", "/format"),
        ({"part": 1}, "invalid_request", "/part"),
    ],
)
def test_a_bad_announcement_is_refused(tenant, body, said, pointer):
    answer = tenant.http.post("/uploads", json={"purpose": "forget", "filename": "f.jsonl", **body})
    assert answer.json()["code"] == said, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer


@on_sqlite
@pytest.mark.parametrize("number", ["0", "-1", "10001", "1.5", "x", str(1 << 70), "%00", "1%2F2"])
def test_a_bad_number_is_refused(tenant, number):
    answer = put(tenant, begin(tenant), number, b"x")
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["code"] in ("invalid_request", "route_not_found")


@on_sqlite
def test_a_part_is_bounded_by_its_length_and_by_counting(tenant):
    upload, large = begin(tenant), tenant.served.settings.upload_part_bytes + 1

    def pieces():
        for _ in range(large // 65536 + 1):
            yield b"x" * 65536

    assert code(put(tenant, upload, 1, b"x" * large)) == (413, "part_too_large")
    assert code(put(tenant, upload, 1, pieces())) == (413, "part_too_large")
    assert code(put(tenant, upload, 1, b"")) == (422, "empty_part")
    assert code(put(tenant, upload, 1, b"x", **{"Content-Encoding": "gzip"})) == (415, "encoded_body")
    assert kept(tenant, upload) == []


@on_sqlite
def test_formats_work_in_parts(tenant):
    upload = begin(tenant, filename="x/forget.csv")
    put(tenant, upload, 1, b'prompt,completion\n"a')
    put(tenant, upload, 2, b'\nb",c\n')
    file = complete(tenant, upload).json()
    assert (file["format"], file["filename"], file["examples"]) == ("csv", "forget.csv", 1)


def test_completions_at_once_give_one_file(tenant):
    upload = begin(tenant)
    put(tenant, upload, 1, CONTENT)
    barrier, answers = threading.Barrier(4), []

    def finish():
        with httpx.Client(base_url=tenant.served.url, headers=tenant.http.headers, timeout=20) as http:
            barrier.wait()
            answers.append(http.post(f"/uploads/{upload}/complete"))

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Who finds the parts gone that another has just completed is told to ask again.
    assert {answer.status_code for answer in answers} <= {201, 409}
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1
    assert complete(tenant, upload).json()["id"] in made
    assert len(tenant.http.get("/files").json()["data"]) == 1


@pytest.mark.parametrize("done", [False, True])
def test_an_upload_that_is_given_up_leaves_nothing_but_its_file(tenant, done):
    upload = begin(tenant)
    put(tenant, upload, 1, CONTENT)
    if done:
        complete(tenant, upload)
    assert tenant.http.delete(f"/uploads/{upload}").status_code == 204
    assert kept(tenant, upload) == []
    for answer in (
        tenant.http.delete(f"/uploads/{upload}"),
        tenant.http.get(f"/uploads/{upload}"),
        put(tenant, upload, 1, b"x"),
        complete(tenant, upload),
    ):
        assert code(answer) == (404, "upload_not_found")
    assert len(tenant.http.get("/files").json()["data"]) == done


def test_what_nobody_completes_expires(tenant):
    upload, fresh = begin(tenant), begin(tenant)
    for one in (upload, fresh):
        put(tenant, one, 1, CONTENT)
    with tenant.served.database.write() as session:
        expired = update(Upload).where(Upload.id == upload)
        session.execute(expired.values(expires_at=now() - timedelta(seconds=1)))
    assert code(put(tenant, upload, 1, b"x")) == (404, "upload_not_found")
    expire_uploads(tenant.served.database, tenant.served.settings)
    assert kept(tenant, upload) == []
    assert len(kept(tenant, fresh)) == 1
    with tenant.served.database.read() as session:
        assert session.get(Upload, upload) is None
    assert complete(tenant, fresh).status_code == 201


def test_a_file_deleted_after_its_upload_is_gone_for_both(tenant):
    upload = begin(tenant)
    put(tenant, upload, 1, CONTENT)
    file = complete(tenant, upload).json()
    tenant.http.delete(f"/files/{file['id']}")
    assert code(complete(tenant, upload)) == (410, "file_deleted")
