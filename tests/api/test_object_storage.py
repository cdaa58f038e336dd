"""The API on an object store: downloads sent on to it or passed through, and what happens when it is away."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.app import create_app
from api.settings import ApiSettings
from client import Client, DownloadError
from store.database import Database
from tests.cutting import Cutter, cutting
from tests.services import S3_SECRET
from tests.serving import SECRET, Served, Tenant, finish, serve

SIZE = 2_500_000
NAME = "model.safetensors"
ODD = 'weights "für" 50%.bin'
CONTENT = {NAME: random.Random(3).randbytes(SIZE), ODD: b"odd", "config.json": b"{}"}

Make = Callable[..., Served]


@pytest.fixture
def make_served(tmp_path: Path, sqlite_template: Path, s3_bucket: str) -> Iterator[Make]:
    """The API on a bucket of its own, with the settings given."""
    opened = []

    def make(**settings: object) -> Served:
        path = tmp_path / "data" / "seuf.db"
        path.parent.mkdir()
        path.write_bytes(sqlite_template.read_bytes())
        values = {"data_dir": path.parent, "secret": SECRET.decode(), "artefacts_url": s3_bucket, **settings}
        full = ApiSettings.model_validate(values)
        database = Database(full.database_url)
        context = serve(create_app(full))
        served = Served(context.__enter__(), full, database)
        opened.append((context, database))
        return served

    yield make
    for context, database in opened:
        context.__exit__(None, None, None)
        database.dispose()


@pytest.fixture
def served(make_served: Make, request: pytest.FixtureRequest) -> Served:
    """As the test's parameters say; else with a redirect."""
    return make_served(**getattr(request, "param", {}))


@pytest.fixture
def made(tenant: Tenant, tiny_model: Path, tmp_path: Path) -> str:
    """A finished job's checkpoint: its id."""
    return finish(tenant.served, tenant.run(tenant.submit(tiny_model)["id"]), tmp_path / "out", dict(CONTENT))


proxied = pytest.mark.parametrize("served", [{"s3_redirect": False}], indirect=True)


def test_an_uploaded_set_lies_in_the_store_until_it_is_deleted(tenant: Tenant, tiny_model: Path) -> None:
    file = tenant.upload("forget")
    (stored,) = tenant.served.artefacts.list("files")
    assert file["id"] in stored.key
    with tenant.served.artefacts.open_read(stored.key) as kept:
        assert hashlib.sha256(kept.read()).hexdigest() == file["sha256"]
    assert tenant.http.delete(f"/files/{file['id']}").status_code == 204
    assert tenant.served.artefacts.list("files") == []
    assert tenant.http.get("/readyz").json()["parts"]["storage"]["ok"]


def test_an_estimate_reads_its_sets_from_the_store(tenant: Tenant, tiny_model: Path) -> None:
    tenant.register(tiny_model)
    sets = {f"{purpose}_set": {"file": tenant.upload(purpose)["id"]} for purpose in ("forget", "retain")}
    answer = tenant.http.post("/jobs/estimate", json={"model": "tiny", **sets})
    assert answer.status_code == 200, answer.text


def test_a_download_is_sent_on_by_a_signed_address(tenant: Tenant, made: str) -> None:
    url = f"/checkpoints/{made}/files/{NAME}"
    answer = tenant.http.get(url, headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (307, b"")
    assert answer.headers["Cache-Control"] == "no-store"
    location = httpx.URL(answer.headers["Location"])
    assert location.params["X-Amz-Expires"] == "60"
    assert S3_SECRET not in str(location)
    assert tenant.key not in str(location)
    there = httpx.get(location, headers={"Range": "bytes=5-9"})
    assert (there.status_code, there.content) == (206, CONTENT[NAME][5:10])
    assert httpx.get(location).content == CONTENT[NAME]
    assert there.headers["Content-Disposition"] == f'attachment; filename="{NAME}"'
    assert "immutable" in there.headers["Cache-Control"]
    assert httpx.get(location.copy_with(query=None)).status_code == 403


def test_what_needs_no_bytes_is_answered_here(tenant: Tenant, made: str) -> None:
    url = f"/checkpoints/{made}/files/{NAME}"
    head = tenant.http.head(url)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(SIZE))
    assert head.headers["Repr-Digest"].startswith("sha-256=:")
    same = tenant.http.get(url, headers={"If-None-Match": head.headers["ETag"]})
    assert same.status_code == 304
    outside = tenant.http.get(url, headers={"Range": f"bytes={SIZE}-"})
    assert (outside.status_code, outside.json()["code"]) == (416, "range_not_satisfiable")


@proxied
@pytest.mark.parametrize("asked", ["bytes=0-0", "bytes=1048570-1048580", f"bytes={SIZE - 1}-", "bytes=-7"])
def test_passed_through_it_is_the_same_bytes(tenant: Tenant, made: str, asked: str) -> None:
    url = f"/checkpoints/{made}/files/{NAME}"
    whole = tenant.http.get(url)
    assert (whole.status_code, whole.content == CONTENT[NAME]) == (200, True)
    part = tenant.http.get(url, headers={"Range": asked})
    start, end = part.headers["Content-Range"].removeprefix("bytes ").partition("/")[0].split("-")
    assert (part.status_code, part.content) == (206, CONTENT[NAME][int(start) : int(end) + 1])


@proxied
def test_any_name_is_a_safe_header(tenant: Tenant, made: str) -> None:
    answer = tenant.http.get(f"/checkpoints/{made}/files/{ODD}")
    assert answer.content == b"odd"
    assert answer.headers["Content-Disposition"] == (
        "attachment; filename=\"weights fr 50.bin\"; filename*=UTF-8''weights%20%22f%C3%BCr%22%2050%25.bin"
    )


@pytest.mark.parametrize("served", [{}, {"s3_redirect": False}], indirect=True, ids=["redirect", "proxied"])
def test_the_client_checks_every_digest(tenant: Tenant, made: str, tmp_path: Path) -> None:
    with Client(tenant.served.url, tenant.key) as client:
        folder = client.download(made, tmp_path / "got")
        assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
        damaged = bytearray(CONTENT[NAME])
        damaged[SIZE // 2] ^= 1
        with tenant.served.artefacts.open_write(f"checkpoints/{made}/{NAME}") as out:
            out.write(damaged)
        with pytest.raises(DownloadError, match="sha256"):
            client.download(made, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_client_resumes_at_the_store(
    make_served: Make, s3_server: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The public address is that of a proxy which cuts: signed for it, and asked for what is missing only."""
    with cutting(s3_server, 1_000_000, 700, 900_000) as cutter:
        served = make_served(s3_public_endpoint_url=cutter.url)
        tenant = a_tenant(served)
        job = tenant.run(tenant.submit(tiny_model)["id"])
        made = finish(served, job, tmp_path / "out", {NAME: CONTENT[NAME]})
        answered: list[int] = []
        with Client(served.url, tenant.key) as client:
            client._elsewhere.event_hooks["response"] = [lambda answer: answered.append(answer.status_code)]
            folder = client.download(made, tmp_path / "got")
    assert (folder / NAME).read_bytes() == CONTENT[NAME]
    assert cutter.connections >= 4
    assert answered[0] == 200
    assert answered.count(206) >= 2
    tenant.http.close()


def a_tenant(served: Served) -> Tenant:
    from store.keys import Keys

    with served.database.write() as session:
        key = Keys(session, "a-tenant").create("test", SECRET).token
    http = httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    return Tenant(served, "a-tenant", key, http)


@pytest.fixture
def cutter(s3_server: str) -> Iterator[Cutter]:
    with cutting(s3_server) as found:
        yield found


def test_a_store_that_is_away_is_a_503_and_loses_nothing(
    make_served: Make, cutter: Cutter, tiny_model: Path, tmp_path: Path
) -> None:
    served = make_served(s3_endpoint_url=cutter.url, s3_redirect=False)
    tenant = a_tenant(served)
    made = finish(served, tenant.run(tenant.submit(tiny_model)["id"]), tmp_path / "out", dict(CONTENT))
    cutter.budgets += [0] * 1000
    before = tenant.http.get("/files").json()
    for answer in (
        tenant.http.post("/files", data={"purpose": "forget"}, files={"file": ("a", b'{"text": "x"}')}),
        tenant.http.get(f"/checkpoints/{made}/files/{NAME}"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_away"), answer.text
        assert answer.headers["Retry-After"] == "5"
    unready = tenant.http.get("/readyz")
    assert (unready.status_code, unready.json()["parts"]["storage"]["ok"]) == (503, False)
    assert tenant.http.get("/files").json() == before
    cutter.budgets.clear()
    assert tenant.http.get(f"/checkpoints/{made}/files/{NAME}").content == CONTENT[NAME]
    tenant.http.close()


def test_no_secret_and_no_signature_is_logged(
    tenant: Tenant, made: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        location = tenant.http.get(f"/checkpoints/{made}/files/{NAME}").headers["Location"]
        with pytest.raises(FileNotFoundError), tenant.served.artefacts.open_read("files/none"):
            pass
    signature = httpx.URL(location).params["X-Amz-Signature"]
    logged = caplog.text + "".join(capfd.readouterr())
    assert "/files/" in logged  # the test's own client logs its request: something is captured
    for secret in (S3_SECRET, signature, tenant.key):
        assert secret not in logged
