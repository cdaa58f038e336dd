"""Hostile bytes on every route that takes some: a stable refusal, nothing kept, memory bounded.

The API is a process of its own, so that its memory can be measured: for each case its peak, above what it had before.
"""

import re
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.hostile import (
    CONTENTS,
    GOOD,
    JSON_BODIES,
    JSON_ROUTES,
    LIMITS,
    MIB,
    NAMES,
    Besieged,
    besieged,
    mutations,
)
from tests.services import wait_until

# Of one request, over what the process has. A hundred thousand ids take some 25 MiB, a million {} in 3 MiB of JSON 70.
MORE_MEMORY = 96 * MIB
INLINE_BYTES = MIB


@pytest.fixture(scope="module")
def house(sqlite_template, tmp_path_factory):
    with besieged(sqlite_template, tmp_path_factory.mktemp("hostile")) as found:
        found.http.post(
            "/files", data={"purpose": "erase"}, files={"file": ("a", b"a")}
        )  # everything is loaded
        yield found


@pytest.fixture
def api(house):
    """The API; afterwards nothing is kept, no crash is logged and its memory was bounded."""
    house.forget_peak()
    before, logged = house.memory("VmRSS"), house.log.stat().st_size
    yield house
    grown = house.memory("VmHWM") - before
    try:
        wait_until(lambda: house.kept() == {}, 2, f"nothing to be kept: {house.kept()}")
    finally:
        house.clear()
    assert grown < MORE_MEMORY, f"{grown / MIB:.0f} MiB more"
    assert "Traceback" not in house.log.read_text()[logged:]


def refused(answer: httpx.Response, code: str | None = None) -> None:
    """It is refused in our shape, with this code."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert re.fullmatch(r"[a-z0-9_]{3,40}", problem["code"])
    assert len(answer.content) < 50_000
    assert problem["request_id"]
    if code is not None:
        assert problem["code"] == code, answer.text[:500]


def taken_back(api: Besieged, answer: httpx.Response) -> None:
    """It is harmless: it was taken, and is deleted again."""
    assert answer.status_code == 201, answer.text[:500]
    assert api.http.delete(f"/files/{answer.json()['id']}").status_code == 204


def send(api: Besieged, name: str, content: bytes, purpose: str = "forget") -> httpx.Response:
    return api.http.post("/files", data={"purpose": purpose}, files={"file": (name, content)})


def send_in_parts(api: Besieged, name: str, content: bytes) -> httpx.Response:
    """In parts of at most 3 MiB, whose refusal counts too; the upload is given up afterwards."""
    begun = api.http.post("/uploads", json={"purpose": "forget", "filename": name})
    assert begun.status_code == 201, begun.text
    where = begun.headers["Location"]
    pieces = [content[at : at + 3 * MIB] for at in range(0, len(content), 3 * MIB)]
    for number, piece in enumerate(pieces, start=1):
        answer = api.http.put(f"{where}/parts/{number}", content=piece)
        if answer.is_error:
            break
    else:
        answer = api.http.post(f"{where}/complete")
    assert api.http.delete(where).status_code == 204
    return answer


@pytest.mark.parametrize("case", CONTENTS)
def test_a_hostile_file(api, case):
    name, content, code = CONTENTS[case]
    refused(send(api, name, content), code)


def _costly(case: str) -> bool:
    """Those that take half a second each come one way in the ordinary run, and every way in the long one."""
    return "million" in case or case == "too many examples" or CONTENTS[case][0].endswith(".parquet")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] * _costly(case)) for case in CONTENTS]
)
def test_a_hostile_file_in_parts(api, case):
    name, content, code = CONTENTS[case]
    refused(send_in_parts(api, name, content), code)


INLINE = [case for case, (name, _, _) in CONTENTS.items() if name.endswith((".jsonl", ".csv", ".txt"))]


@pytest.mark.parametrize("case", INLINE)
def test_a_hostile_set_inside_a_job(api, case):
    name, content, _ = CONTENTS[case]
    kind = {"jsonl": "jsonl", "csv": "csv", "txt": "text"}[name.rpartition(".")[2]]
    given = {"content": content.decode("utf-8", "replace"), "format": kind}
    refused(api.http.post("/jobs", json={"model": "none", "forget_set": given}))


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize("case", JSON_BODIES)
def test_a_hostile_body(api, route, case):
    headers = {"Content-Type": "application/json"}
    refused(api.http.post(route, content=JSON_BODIES[case], headers=headers))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_is_only_ever_shown(api, name):
    quoted = name.replace('"', "%22").encode("utf-8", "replace")
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="format"\r\n\r\njsonl\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + quoted + b'"\r\n\r\n'
    body += GOOD + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = api.http.post("/files", content=body, headers=headers)
    if answer.is_error:  # some cannot stand in a header at all
        refused(answer)
    else:
        shown = answer.json()["filename"]
        assert shown.isprintable()
        assert not re.search(r"[/\\\0]", shown)
        assert len(shown) <= 255
        taken_back(api, answer)
    begun = api.http.post("/uploads", json={"purpose": "forget", "filename": name, "format": "jsonl"})
    if begun.is_error:
        refused(begun, "invalid_request")
    else:
        assert not re.search(r"[/\\\0]", begun.json()["filename"])
        assert api.http.delete(begun.headers["Location"]).status_code == 204


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(api, seed):
    """Damage may leave a good file; it must never be anything but taken or refused."""
    for number, content in enumerate(mutations(24)):
        if number % 4 == seed:
            for name in ("a.jsonl", "a.csv", "a.parquet", "a.txt"):
                answer = send(api, name, content)
                taken_back(api, answer) if answer.is_success else refused(answer)


HEAD = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
CSV, PARQUET = FILE.replace(b"jsonl", b"csv"), FILE.replace(b"jsonl", b"parquet")
END = b"\r\n--x--\r\n"
FORMS = {
    "no end": HEAD + FILE + GOOD,
    "nothing": b"",
    "only an end": b"--x--\r\n",
    "another boundary": (HEAD + FILE + GOOD + END).replace(b"--x", b"--y"),
    "a boundary inside the file": HEAD + FILE + b"\r\n--x\r\n" + GOOD + END,
    "bare newlines": (HEAD + FILE + GOOD + END).replace(b"\r\n", b"\n"),
    "no disposition": HEAD + b"--x\r\nContent-Type: text/plain\r\n\r\n" + GOOD + END,
    "a header without a colon": HEAD + b"--x\r\nContent-Disposition\r\n\r\n" + GOOD + END,
    "a header of a megabyte": HEAD + b"--x\r\nX-A: " + b"a" * MIB + b"\r\n\r\n" + GOOD + END,
    "ten thousand headers": HEAD + b"--x\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n" + GOOD + END,
    "ten thousand parts": HEAD * 10_000 + FILE + GOOD + END,
    "two files": HEAD + FILE + GOOD + b"\r\n" + FILE + GOOD + END,
    "purpose of a megabyte": HEAD.replace(b"forget", b"f" * MIB) + FILE + GOOD + END,
    "purpose of bad bytes": HEAD.replace(b"forget", b"\xff\0") + FILE + GOOD + END,
    "format after the file": HEAD + FILE + GOOD + b"\r\n" + HEAD.replace(b"purpose", b"format") + END,
    "an unknown part": HEAD.replace(b"purpose", b"path") + FILE + GOOD + END,
    "a part without a name": HEAD.replace(b' name="purpose"', b"") + FILE + GOOD + END,
    "a nested multipart": HEAD + FILE[:-2] + b"Content-Type: multipart/mixed; boundary=z\r\n\r\n" + END,
    "bytes before it": b"garbage" + HEAD + FILE + GOOD + END,
}


@pytest.mark.parametrize("case", FORMS)
def test_a_hostile_form(api, case):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(api.http.post("/files", content=FORMS[case], headers=headers))


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 5000,
        "multipart/form-data; boundary=x; boundary=y",
        'multipart/form-data; boundary="\r"',
        "multipart/mixed; boundary=x",
        "application/json",
        "text/csv",
        "a" * 8000,
    ],
)
def test_a_hostile_content_type(api, kind):
    try:
        answer = api.http.post("/files", content=HEAD + b"--y--", headers={"Content-Type": kind})
    except httpx.LocalProtocolError:
        pytest.skip("no HTTP client sends it")
    refused(answer)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, gzip", "x" * 100])
def test_a_compressed_body(api, coding):
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": coding}
    refused(api.http.post("/files", content=HEAD + FILE + GOOD + END, headers=headers), "encoded_body")


@pytest.fixture
def upload(api):
    where = api.http.post("/uploads", json={"purpose": "forget", "filename": "a.jsonl"}).headers["Location"]
    yield where
    api.http.delete(where)


NUMBERS = (
    "0",
    "-1",
    "-0",
    "10001",
    "9" * 20,
    "9" * 3000,
    "1e3",
    "0x1",
    "\u0661",
    "NaN",
    "..",
    "%2e%2e",
    ";",
    "",
)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hostile_number_of_a_part(api, upload, number):
    refused(api.http.put(f"{upload}/parts/{number}", content=GOOD))


DIGESTS = ("sha-256=:AAAA:", "sha-256=AAAA", "md5=:AAAA:", "x" * 8000, f"sha-256=:{'A' * 8000}:", ":", "=")


@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
@pytest.mark.parametrize("value", DIGESTS)
def test_a_hostile_digest(api, upload, name, value):
    refused(api.http.put(f"{upload}/parts/1", content=GOOD, headers={name: value}))


@pytest.mark.parametrize("order", [(2, 1), (3,), (1, 3), (10_000, 1), (1, 2, 4)])
def test_parts_out_of_order(api, upload, order):
    for number in order:
        assert api.http.put(f"{upload}/parts/{number}", content=GOOD).status_code == 201
    answer = api.http.post(f"{upload}/complete")
    if order == (2, 1):
        taken_back(api, answer)
    else:
        refused(answer, "upload_incomplete")


def test_many_parts_of_one_byte(api, upload):
    for number, byte in enumerate(GOOD, start=1):
        assert api.http.put(f"{upload}/parts/{number}", content=bytes([byte])).status_code == 201
    taken_back(api, api.http.post(f"{upload}/complete"))


def test_parts_together_over_the_size(api, upload):
    part = b"x" * LIMITS["SEUF_UPLOAD_PART_BYTES"]
    for number in range(1, 4):
        assert api.http.put(f"{upload}/parts/{number}", content=part).status_code == 201
    refused(api.http.put(f"{upload}/parts/4", content=b"x"), "file_too_large")


def test_uploads_without_end(api):
    opened = []
    while (answer := api.http.post("/uploads", json={"purpose": "forget", "filename": "a"})).is_success:
        opened.append(answer.headers["Location"])
        assert len(opened) <= 100
    refused(answer, "too_many_uploads")
    for where in opened:
        assert api.http.delete(where).status_code == 204


class Stream:
    """A body without end, which counts what was taken of it."""

    def __init__(self, head: bytes = b"", piece: bytes = b"x" * 65536, size: int = 10 << 30) -> None:
        self.head, self.piece, self.left, self.sent = head, piece, size, 0

    def __iter__(self):
        yield self.head
        while self.left > 0:
            self.left -= len(self.piece)
            self.sent += len(self.piece)
            yield self.piece


ENDLESS = {
    "a line of 10 GB": ("POST", "/files", HEAD + FILE + b'{"text": "', b"x" * 65536, 8 * MIB),
    "lines of 10 GB": ("POST", "/files", HEAD + FILE, GOOD.replace(b"fine", b"x" * 5000) * 20, 8 * MIB),
    "CSV quotes of 10 GB": ("POST", "/files", HEAD + CSV + b'text\n"', b"x\n" * 32768, 8 * MIB),
    "Parquet of 10 GB": ("POST", "/files", HEAD + PARQUET + b"PAR1", b"x" * 65536, 8 * MIB),
    "a file before its purpose": ("POST", "/files", FILE, b"x" * 65536, 8 * MIB),
    "a purpose of 10 GB": ("POST", "/files", HEAD[:-2], b"x" * 65536, MIB),
    "a preamble of 10 GB": ("POST", "/files", b"", b"x" * 65536, MIB),
    "a header of 10 GB": ("POST", "/files", HEAD + b"--x\r\nX-A: ", b"x" * 65536, MIB),
    "a part of 10 GB": ("PUT", "/uploads/upload_x/parts/1", b"", b"x" * 65536, 4 * MIB),
    "a job of 10 GB": ("POST", "/jobs", b'{"model": "', b"x" * 65536, 4 * MIB),
    "a job of spaces": ("POST", "/jobs", b"", b" " * 65536, 4 * MIB),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_body_of_10_gigabytes_is_cut_off(api, case):
    method, path, head, piece, cap = ENDLESS[case]
    where = None
    if method == "PUT":
        where = api.http.post("/uploads", json={"purpose": "forget", "filename": "a"}).headers["Location"]
        path = f"{where}/parts/1"
    stream = Stream(head, piece)
    headers = {"Content-Type": "multipart/form-data; boundary=x" if path == "/files" else "application/json"}
    refused(api.http.request(method, path, content=stream, headers=headers))
    # What lies in the buffers of the two sockets was sent too.
    assert stream.sent < cap + 48 * MIB
    if where:
        api.http.delete(where)


@pytest.mark.parametrize("path", ["/files", "/jobs"])
@pytest.mark.parametrize("length", ["10737418240", "9" * 18])
def test_a_body_is_refused_by_its_length_before_it_comes(api, path, length):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {api.http.headers['Authorization']}\r\n"
    head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n"
    answer = raw(api, head.encode(), 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("length", ["-1", "9" * 5000, "1, 2", "0x10", "1\r\nContent-Length: 2"])
def test_a_length_that_is_none(api, length):
    head = f"POST /files HTTP/1.1\r\nHost: x\r\nAuthorization: {api.http.headers['Authorization']}\r\n"
    answer = raw(api, f"{head}Content-Length: {length}\r\n\r\nab".encode(), 5)
    assert answer.startswith(b"HTTP/1.1 4"), answer[:200]


def raw(api: Besieged, sent: bytes, seconds: float) -> bytes:
    """What the API answers to these bytes, until it closes the connection."""
    address = urlsplit(api.url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        connection.sendall(sent)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def slowly(api: Besieged, method: str, path: str, body: bytes, drip: bytes, answers: list[bytes]) -> None:
    """Send `body` and then a byte at a time, until an answer comes."""
    address = urlsplit(api.url)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {api.http.headers['Authorization']}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=0.2) as connection:
        connection.sendall(head.encode() + body)
        answer, end = b"", time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if drip:
                    connection.sendall(drip)
                if not (piece := connection.recv(65536)):
                    break
                answer += piece
            except TimeoutError:
                continue
            except OSError:
                break
        answers.append(answer)


def test_slow_bodies_are_ended_and_others_are_served_meanwhile(api, upload):
    ways = [
        ("POST", "/files", b"", b""),
        ("POST", "/files", HEAD + FILE, b""),
        ("POST", "/files", HEAD + FILE, b"x"),
        ("PUT", f"{upload}/parts/1", b"", b"x"),
        ("PUT", f"{upload}/parts/2", b"x" * 1000, b""),
        ("POST", "/jobs", b"{", b" "),
    ]
    answers, began = [], time.monotonic()
    threads = [threading.Thread(target=slowly, args=(api, *way, answers)) for way in ways * 8]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        asked = time.monotonic()
        assert api.http.get("/files").status_code == 200
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.05)
    assert time.monotonic() - began < 10
    assert slowest < 2
    assert len(answers) == len(threads)
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408 "), answer[:300]
        assert b"body_too_slow" in answer
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_a_connection_that_ends_leaves_nothing(api, upload, share):
    body = HEAD + FILE + GOOD * 2000 + END
    ways = [("POST", "/files"), ("PUT", f"{upload}/parts/1"), ("POST", "/jobs"), ("POST", "/uploads")]
    address = urlsplit(api.url)
    for method, path in ways:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {api.http.headers['Authorization']}\r\n"
        )
        head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            connection.sendall(head.encode() + body[: int(len(body) * share)])
    assert api.http.get(upload).json()["parts"] == []


def test_the_process_is_as_small_as_before(house):
    """After all of the above (it is the last): what a request needed was given back, or is used again."""
    cases = ("a million broken lines", "CSV of a million columns", "a line over the limit")
    before = 0
    for turn in range(3):
        for case in cases:
            name, content, code = CONTENTS[case]
            refused(send(house, name, content), code)
        if turn == 0:
            before = house.memory("VmRSS")
    assert house.memory("VmRSS") - before < 24 * MIB
    assert house.memory("VmRSS") < 400 * MIB


@pytest.mark.long
def test_many_more_damaged_files(api):
    for content in mutations(500):
        for name in ("a.jsonl", "a.csv", "a.parquet"):
            answer = send(api, name, content)
            taken_back(api, answer) if answer.is_success else refused(answer)


@pytest.mark.long
def test_hostile_files_at_once(house):
    """Eight clients at the same time, each with what needs most: the sum is bounded too, but by eight requests."""
    cases = ["too many examples", "CSV of a million columns", "parquet that shares a megabyte 50,000 times"]

    def attack() -> None:
        headers = {"Authorization": house.http.headers["Authorization"]}
        with httpx.Client(base_url=house.url, headers=headers, timeout=120) as http:
            for case in cases:
                name, content, code = CONTENTS[case]
                answer = http.post("/files", data={"purpose": "forget"}, files={"file": (name, content)})
                outcomes.append(answer.json()["code"] == code)

    outcomes: list[bool] = []
    house.forget_peak()
    before = house.memory("VmRSS")
    threads = [threading.Thread(target=attack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 24
    assert house.memory("VmHWM") - before < 400 * MIB
    assert house.kept() == {}
