"""Events: JSON pages without gaps, and a live stream that replays, follows, and ends with the job."""

import json
import threading

import httpx
import pytest

from client import sse
from tests.serving import on_sqlite

STREAM = {"Accept": "text/event-stream"}


def read(tenant, job, after=None):
    """All messages of one connection, until the server ends it."""
    headers = STREAM | ({"Last-Event-ID": str(after)} if after is not None else {})
    with tenant.http.stream("GET", f"/jobs/{job}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return list(sse.messages(answer.iter_lines()))


@pytest.fixture
def ended(tenant, tiny_model):
    """A job that ran and failed, with 25 events."""
    job = tenant.submit(tiny_model)["id"]
    held = tenant.run(job)
    for step in range(22):
        held.step(step, 0.5, None, {"step": step, "note": "line one\nline two \u2028 three"})
    held.fail("no_luck", "It broke.", None)
    return job


def test_pages_have_no_gaps_and_no_overlap(tenant, ended):
    seen, after = [], 0
    while after is not None:
        page = tenant.http.get(f"/jobs/{ended}/events", params={"after": after, "limit": 10}).json()
        seen += page["data"]
        assert page["has_more"] == (page["next"] is not None)
        after = page["next"]
    assert [event["seq"] for event in seen] == list(range(1, 26))
    assert seen[0] == {
        "seq": 1,
        "type": "status",
        "data": {"status": "queued"},
        "created_at": seen[0]["created_at"],
    }
    assert seen[-1]["data"]["status"] == "failed"


def test_a_stream_replays_everything_and_ends(tenant, ended):
    messages = read(tenant, ended)
    assert [int(message.id) for message in messages] == list(range(1, 26))
    pages = tenant.http.get(f"/jobs/{ended}/events").json()["data"]
    assert [json.loads(message.data) for message in messages] == pages
    assert [message.event for message in messages] == [event["type"] for event in pages]


@pytest.mark.parametrize("after", [0, 1, 13, 24])
def test_a_stream_goes_on_behind_the_last_event_seen(tenant, ended, after):
    assert [int(m.id) for m in read(tenant, ended, after)] == list(range(after + 1, 26))


def test_a_stream_says_when_nothing_is_left(tenant, ended):
    for last in ("25", "999"):
        answer = tenant.http.get(f"/jobs/{ended}/events", headers=STREAM | {"Last-Event-ID": last})
        assert (answer.status_code, answer.content) == (204, b"")


def test_a_stream_follows_a_running_job(tenant, tiny_model):
    job = tenant.submit(tiny_model)["id"]
    seen, first = [], threading.Event()

    def follow():
        headers = STREAM | {"Authorization": f"Bearer {tenant.key}"}
        url = f"{tenant.served.url}/jobs/{job}/events"
        with httpx.stream("GET", url, headers=headers, timeout=20) as answer:
            for message in sse.messages(answer.iter_lines()):
                seen.append(json.loads(message.data))
                first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(10)
    held = tenant.run(job)
    held.phase("attributing", 1, 2)
    held.fail("no_luck", "It broke.", None)
    thread.join(10)
    assert not thread.is_alive()
    assert [event["type"] for event in seen] == ["status", "status", "phase", "status"]
    assert [event["seq"] for event in seen] == [1, 2, 3, 4]


@pytest.mark.parametrize("headers", [{}, STREAM])
def test_an_unknown_job_is_a_problem_not_a_stream(tenant, headers):
    answer = tenant.http.get("/jobs/job_nobody/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


@on_sqlite
@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_a_bad_last_event_id_is_refused(tenant, ended, last):
    answer = tenant.http.get(f"/jobs/{ended}/events", headers=STREAM | {"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_event_id")


@on_sqlite
def test_a_page_size_out_of_range_is_refused(tenant, ended):
    answer = tenant.http.get(f"/jobs/{ended}/events?limit=5000")
    assert answer.json()["errors"][0]["parameter"] == "limit"
