"""Webhooks as they are sent: to a real receiver over TLS, under every trouble that receivers and networks make."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from store.audit import Audit
from store.database import Database
from store.sealed import Sealer, new_secret
from store.settings import Settings
from store.tables import Webhook, WebhookAttempt, WebhookDelivery, WebhookMessage, now
from store.webhooks import JOB_TYPES, TEST, Webhooks
from tests.receiving import NAME, Certificate, Receiver, certificate, drip, receiver, receiver_on
from tests.seeds import add_job, add_running
from tests.services import free_port, wait_until
from worker.posting import NoAddressError
from worker.webhooks import Courier, forget_old

__all__ = ["certificate", "receiver"]

SECRET = "the secret of this service, which is long enough for every check"
HERE = "127.0.0.1"


class Sender:
    """A database, and a courier that finds NAME at an address of the test's choice."""

    def __init__(self, database: Database, folder: Path, certificate: Certificate, **settings: Any) -> None:
        self.database = database
        self.certificate = certificate
        self.given = {
            "data_dir": folder,
            "database_url": database.url.render_as_string(hide_password=False),
            "secret": SECRET,
            "webhook_retry_seconds": "60,60",  # a test says itself when the time has come: due_now
            "webhook_timeout_seconds": 5,
            "webhook_allow": "127.0.0.1/32",
            **settings,
        }
        self.secrets: dict[str, str] = {}
        self.addresses: Callable[[str, int], Sequence[str]] = lambda _host, _port: [HERE]

    def courier(self, **settings: Any) -> Courier:
        made = Settings(**{**self.given, **settings})
        return Courier(
            self.database,
            made,
            resolver=lambda host, port: self.addresses(host, port),
            context=self.certificate.client,
        )

    def hook(self, receiver: Receiver, events: Sequence[str] = JOB_TYPES, **where: str) -> str:
        """A webhook to this receiver; returns its id."""
        self._allow_port(receiver.port)
        secret = new_secret()
        with self.database.write() as session:
            sealed = Sealer(SECRET.encode()).seal(secret)
            row = Webhooks(session).create(receiver.url(**where), "", list(events), sealed)
        self.secrets[row.id] = secret
        return row.id

    def _allow_port(self, port: int) -> None:
        self.given["webhook_ports"] = f"{self.given.get('webhook_ports', 443)},{port}"

    def deliveries(self, hook: str) -> list[WebhookDelivery]:
        with self.database.read() as session:
            return Webhooks(session).deliveries(hook, limit=100).data[::-1]

    def attempts(self, hook: str) -> list[tuple[int, int | None, str | None]]:
        """Number, status and error of each attempt of the oldest delivery."""
        delivery = self.deliveries(hook)[0].id
        with self.database.read() as session:
            rows = Webhooks(session).attempts([delivery])[delivery]
        return [(row.number, row.status_code, row.error) for row in rows]

    def row(self, hook: str) -> Webhook:
        with self.database.read() as session:
            return Webhooks(session).get(hook)

    def test(self, hook: str) -> None:
        with self.database.write() as session:
            Webhooks(session).test(hook)

    def due_now(self) -> None:
        """As if the time had come for everything that waits."""
        with self.database.write() as session:
            waiting = update(WebhookDelivery).where(WebhookDelivery.status == "pending")
            session.execute(waiting.values(next_attempt_at=now() - timedelta(seconds=1)))


@pytest.fixture
def sender(database: Database, tmp_path: Path, certificate: Certificate) -> Sender:
    return Sender(database, tmp_path, certificate)


@pytest.fixture
def on_sqlite(sqlite_template: Path, tmp_path: Path, certificate: Certificate) -> Iterator[Sender]:
    """For what does not depend on the database."""
    path = tmp_path / "seuf.db"
    path.write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{path}")
    yield Sender(database, tmp_path, certificate)
    database.dispose()


def verified(request: Any, secret: str) -> dict[str, Any]:
    """The message, if the library of the standard accepts its signature."""
    return dict(Verifier(secret).verify(request.body, request.headers))


def test_a_job_is_told_from_its_first_state_to_its_last(sender: Sender, receiver: Receiver) -> None:
    hook = sender.hook(receiver)
    job = add_running(sender.database)
    job.phase("unlearning", 1, 2)
    job.fail("ENGINE_CRASHED", "it quoted Ottilie", None)
    sender.courier().run()
    messages = [verified(request, sender.secrets[hook]) for request in receiver.requests]
    by_seq = sorted(messages, key=lambda message: message["data"]["seq"])
    assert [message["type"] for message in by_seq] == ["job.queued", "job.running", "job.failed"]
    assert by_seq[-1]["data"] == {
        "job": job.job_id,
        "status": "failed",
        "seq": 4,
        "error_code": "ENGINE_CRASHED",
    }
    assert [delivery.status for delivery in sender.deliveries(hook)] == ["delivered"] * 3
    request = receiver.requests[0]
    assert request.headers["webhook-id"] == sender.deliveries(hook)[0].message_id
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 3
    assert (request.headers["host"], request.server_name) == (f"{NAME}:{receiver.port}", NAME)
    assert request.headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        verified(request, new_secret())
    request.body = request.body.replace(b"queued", b"failed")
    with pytest.raises(WebhookVerificationError):
        verified(request, sender.secrets[hook])
    sender.courier().run()
    assert len(receiver.requests) == 3


def test_only_what_was_asked_for(on_sqlite: Sender, receiver: Receiver) -> None:
    on_sqlite.hook(receiver, ["job.failed"], path="/failed")
    on_sqlite.hook(receiver, ["job.running", "job.failed"], path="/both")
    add_running(on_sqlite.database).fail("X", "", None)
    on_sqlite.courier().run()
    assert sorted(request.path for request in receiver.requests) == ["/both", "/both", "/failed"]


def test_a_message_is_sent_again_until_it_is_taken(sender: Sender, receiver: Receiver) -> None:
    answers = iter([500, 429, 204])
    receiver.answer = lambda _request, _handler: next(answers)
    hook = sender.hook(receiver)
    sender.test(hook)
    for _ in range(3):
        sender.courier().run()
        sender.due_now()
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert sender.attempts(hook) == [(1, 500, None), (2, 429, None), (3, 204, None)]
    (delivery,) = sender.deliveries(hook)
    assert (delivery.status, delivery.attempts, delivery.next_attempt_at) == ("delivered", 3, None)
    assert sender.row(hook).failing_since is None
    assert verified(receiver.requests[0], sender.secrets[hook])["type"] == TEST


def test_a_message_is_given_up_and_replayed(sender: Sender, receiver: Receiver) -> None:
    receiver.answer = lambda _request, _handler: 503
    hook = sender.hook(receiver)
    sender.test(hook)
    for _ in range(5):
        sender.courier().run()
        sender.due_now()
    (delivery,) = sender.deliveries(hook)
    assert (delivery.status, delivery.attempts) == ("failed", 3)  # two pauses are three attempts
    assert sender.row(hook).failing_since is not None
    receiver.answer = lambda _request, _handler: 200
    with sender.database.write() as session:
        Webhooks(session).replay(hook, delivery.id)
    sender.courier().run()
    assert sender.attempts(hook)[-1] == (4, 200, None)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert sender.deliveries(hook)[0].status == "delivered"


def test_the_ladder(on_sqlite: Sender) -> None:
    """The pauses of the settings, each up to a fifth shorter or longer, then none."""
    courier = on_sqlite.courier(webhook_retry_seconds=Settings.model_fields["webhook_retry_seconds"].default)
    wanted = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    for number, seconds in enumerate(wanted, 1):
        drawn = [courier._pause(number) for _ in range(50)]
        assert all(0.8 * seconds <= pause <= 1.2 * seconds for pause in drawn if pause is not None)
        assert len(set(drawn)) > 1
    assert courier._pause(len(wanted) + 1) is None


def test_a_receiver_that_is_gone_is_left_alone(sender: Sender, receiver: Receiver) -> None:
    receiver.answer = lambda _request, _handler: 410
    hook = sender.hook(receiver)
    sender.test(hook)
    sender.test(hook)
    sender.courier().run()
    assert len(receiver.requests) == 1
    assert sender.row(hook).disabled_at is not None
    assert [delivery.status for delivery in sender.deliveries(hook)] == ["failed", "failed"]
    with sender.database.read() as session:
        (row,) = Audit(session).list()
    assert (row.who, row.what, row.object) == ("system", "webhook.disable", hook)
    add_job(sender.database)
    assert len(sender.deliveries(hook)) == 2


def test_days_of_failure_disable(sender: Sender, receiver: Receiver) -> None:
    receiver.answer = lambda _request, _handler: 500
    hook = sender.hook(receiver)
    sender.test(hook)
    sender.courier().run()
    assert sender.row(hook).disabled_at is None
    for days, disabled in ((4.99, False), (5.01, True)):
        with sender.database.write() as session:
            Webhooks(session).get(hook).failing_since = now() - timedelta(days=days)
        sender.due_now()
        sender.courier().run()
        assert (sender.row(hook).disabled_at is not None) is disabled


def test_a_slow_receiver_delays_nobody(sender: Sender, receiver: Receiver, certificate: Certificate) -> None:
    """While one holds its message, others get all of theirs; it gets no second one meanwhile."""
    let_go, held = threading.Event(), threading.Event()

    def hold(_request: object, _handler: object) -> int:
        held.set()
        let_go.wait(20)
        return 200

    with receiver_on(certificate) as slow:
        slow.answer = hold
        slow_hook, hook = sender.hook(slow), sender.hook(receiver)
        for _ in range(3):
            sender.test(slow_hook)
        courier = sender.courier(webhook_timeout_seconds=20)
        thread = threading.Thread(target=courier.run)
        thread.start()
        try:
            assert held.wait(10)
            for _ in range(5):
                sender.test(hook)
            wait_until(lambda: len(receiver.requests) == 5, 10, "the others' messages")
            assert len(slow.requests) == 1
        finally:
            let_go.set()
            thread.join(20)
        assert not thread.is_alive()
        assert len(slow.requests) == 3


def test_no_more_receivers_at_a_time_than_allowed(on_sqlite: Sender, receiver: Receiver) -> None:
    now_open, most, lock = [0], [0], threading.Lock()

    def count(_request: object, _handler: object) -> int:
        with lock:
            now_open[0] += 1
            most[0] = max(most[0], now_open[0])
        time.sleep(0.05)  # long enough for others to come in between
        with lock:
            now_open[0] -= 1
        return 200

    receiver.answer = count
    for number in range(6):
        on_sqlite.test(on_sqlite.hook(receiver, path=f"/{number}"))
    on_sqlite.courier(webhook_concurrency=2).run()
    assert (len(receiver.requests), most[0]) == (6, 2)


def test_a_receiver_that_is_down_is_not_asked_for_every_message(
    on_sqlite: Sender, receiver: Receiver
) -> None:
    receiver.answer = lambda _request, _handler: 500
    hook = on_sqlite.hook(receiver)
    for _ in range(10):
        on_sqlite.test(hook)
    on_sqlite.courier(webhook_retry_seconds="5,300").run()
    assert len(receiver.requests) == 1
    assert [delivery.status for delivery in on_sqlite.deliveries(hook)] == ["pending"] * 10


def test_killed_between_sending_and_recording(sender: Sender, receiver: Receiver) -> None:
    """The same message comes again, under the same id; the number that was cut off is missing in its log."""
    hook = sender.hook(receiver)
    sender.test(hook)
    process: list[subprocess.Popen[bytes]] = []

    def kill(_request: object, _handler: object) -> int:
        process[0].send_signal(signal.SIGKILL)
        process[0].wait()
        return 200

    receiver.answer = kill
    given = {name: str(value) for name, value in sender.given.items()}
    # The duty as the dispatcher runs it, but for the name, which only the test knows.
    code = (
        "import ssl\n"
        "from store.database import Database\n"
        "from store.settings import Settings\n"
        "from worker.webhooks import Courier\n"
        f"settings = Settings(**{given!r})\n"
        f"context = ssl.create_default_context(cafile={str(sender.certificate.file)!r})\n"
        f"found = lambda *_: [{HERE!r}]\n"
        "Courier(Database(settings.database_url), settings, resolver=found, context=context).run()\n"
    )
    process.append(subprocess.Popen([sys.executable, "-c", code]))
    assert process[0].wait(30) == -signal.SIGKILL
    assert len(receiver.requests) == 1
    assert sender.attempts(hook) == []
    receiver.answer = lambda _request, _handler: 200
    sender.courier().run()
    assert len(receiver.requests) == 1  # it may still be on its way: nobody else takes it yet
    sender.due_now()
    sender.courier().run()
    assert [request.headers["webhook-id"] for request in receiver.requests] == [
        sender.deliveries(hook)[0].message_id
    ] * 2
    assert sender.attempts(hook) == [(2, 200, None)]


def test_two_senders_at_once_send_each_message_once(sender: Sender, receiver: Receiver) -> None:
    hooks = [sender.hook(receiver, path=f"/{number}") for number in range(3)]
    for _ in range(5):
        for hook in hooks:
            sender.test(hook)
    threads = [threading.Thread(target=sender.courier().run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ids = [(request.path, request.headers["webhook-id"]) for request in receiver.requests]
    assert len(ids) == len(set(ids)) == 15


def test_a_rotated_secret_overlaps(sender: Sender, receiver: Receiver) -> None:
    hook = sender.hook(receiver)
    old, new = sender.secrets[hook], new_secret()
    with sender.database.write() as session:
        Webhooks(session).rotate(hook, Sealer(SECRET.encode()).seal(new), timedelta(hours=1))
    sender.test(hook)
    sender.courier().run()
    assert receiver.requests[0].headers["webhook-signature"].count("v1,") == 2
    assert verified(receiver.requests[0], old) == verified(receiver.requests[0], new)
    with sender.database.write() as session:
        Webhooks(session).get(hook).previous_secret_until = now() - timedelta(seconds=1)
    sender.test(hook)
    sender.courier().run()
    assert verified(receiver.requests[1], new)
    with pytest.raises(WebhookVerificationError):
        verified(receiver.requests[1], old)


def test_another_secret_of_the_service(on_sqlite: Sender, receiver: Receiver) -> None:
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    on_sqlite.courier(secret="another secret, as long as the first one was, that is").run()
    ((_, status, error),) = on_sqlite.attempts(hook)
    assert (status, receiver.requests) == (None, [])
    assert "SEUF_SECRET" in str(error)


def test_secrets_are_not_in_the_database(on_sqlite: Sender, receiver: Receiver, tmp_path: Path) -> None:
    hook = on_sqlite.hook(receiver)
    on_sqlite.database.dispose()
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("seuf.db*"))
    assert hook.encode() in raw
    assert on_sqlite.secrets[hook].removeprefix("whsec_").encode() not in raw


# What a hostile receiver, or a hostile name, does


def test_a_name_that_changes_its_address(on_sqlite: Sender, certificate: Certificate) -> None:
    """DNS rebinding: the name is asked once, the socket goes to what was checked, and a new address is checked anew."""
    asked: list[str] = []
    answers = iter([[HERE], ["127.0.0.2"], [HERE, "127.0.0.2"]])

    def rebind(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return next(answers)

    with receiver_on(certificate) as right, receiver_on(certificate, "127.0.0.2") as inside:
        hook = on_sqlite.hook(right)
        on_sqlite.addresses = rebind
        for _ in range(3):
            on_sqlite.test(hook)
            on_sqlite.courier().run()
        assert asked == [NAME] * 3
        assert (right.connections, inside.connections) == (1, 0)
    for delivery in on_sqlite.deliveries(hook)[1:]:
        assert delivery.status == "pending"


def test_the_address_is_connected_to_and_no_other(on_sqlite: Sender, certificate: Certificate) -> None:
    """The same port on two addresses: only the one that the resolver named hears of it."""
    with ExitStack() as stack:
        first = stack.enter_context(receiver_on(certificate))
        hook = on_sqlite.hook(first)
        on_sqlite.addresses = lambda *_: ["127.0.0.3"]  # nothing listens there
        on_sqlite.test(hook)
        on_sqlite.courier(webhook_allow="127.0.0.0/8").run()
        assert first.connections == 0
    assert on_sqlite.attempts(hook) == [(1, None, "It cannot be connected to.")]


def test_the_next_address_is_tried(on_sqlite: Sender, receiver: Receiver) -> None:
    hook = on_sqlite.hook(receiver)
    on_sqlite.addresses = lambda *_: ["127.0.0.3", HERE]
    on_sqlite.test(hook)
    on_sqlite.courier(webhook_allow="127.0.0.0/8").run()
    assert on_sqlite.attempts(hook) == [(1, 200, None)]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(on_sqlite: Sender, receiver: Receiver, status: int) -> None:
    def elsewhere(request: Any, handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Location", f"https://{NAME}:{receiver.port}/elsewhere")
        handler.send_header("Location", "http://169.254.169.254/latest/meta-data/")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    receiver.answer = elsewhere
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    assert [request.path for request in receiver.requests] == ["/seuf"]
    assert on_sqlite.attempts(hook) == [(1, status, None)]


def test_no_proxy_of_the_environment(
    on_sqlite: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    assert on_sqlite.attempts(hook) == [(1, 200, None)]


def test_an_answer_that_drips(on_sqlite: Sender, receiver: Receiver) -> None:
    """Each byte comes in time; the whole does not."""
    receiver.answer = drip
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    began = time.monotonic()
    on_sqlite.courier(webhook_timeout_seconds=0.5).run()
    assert time.monotonic() - began < 4
    assert on_sqlite.attempts(hook) == [(1, None, "No answer within 0.5 s.")]


def test_an_answer_without_end(on_sqlite: Sender, receiver: Receiver) -> None:
    """A few kB of it are read, then we leave."""
    sent = [0]

    def pour(_request: object, handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        try:
            while True:
                sent[0] += handler.wfile.write(b"x" * 65536)
        except OSError:
            pass

    receiver.answer = pour
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    assert on_sqlite.attempts(hook) == [(1, 200, None)]
    assert sent[0] < 64 << 20  # what the system's buffers take


def test_what_is_not_http(on_sqlite: Sender, receiver: Receiver) -> None:
    receiver.answer = lambda _request, handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n") and None
    hook = on_sqlite.hook(receiver)
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    assert on_sqlite.attempts(hook) == [(1, None, "What came back is not HTTP.")]


def test_a_certificate_of_another_name(on_sqlite: Sender, receiver: Receiver) -> None:
    hook = on_sqlite.hook(receiver, name="other.example.com")
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    ((_, status, error),) = on_sqlite.attempts(hook)
    assert (status, receiver.requests) == (None, [])
    assert "certificate is not valid" in str(error)


def test_a_name_without_an_address(on_sqlite: Sender, receiver: Receiver) -> None:
    def nowhere(*_: object) -> Sequence[str]:
        raise NoAddressError

    hook = on_sqlite.hook(receiver)
    on_sqlite.addresses = nowhere
    on_sqlite.test(hook)
    on_sqlite.courier().run()
    assert on_sqlite.attempts(hook) == [(1, None, "Its name has no address.")]


def test_logs_tell_neither_url_nor_secret(
    on_sqlite: Sender, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answer = lambda _request, _handler: 500
    hook = on_sqlite.hook(receiver, path="/?token=hidden-in-the-url")
    on_sqlite.test(hook)
    with caplog.at_level(logging.DEBUG):
        on_sqlite.courier().run()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("worker", "store"))]
    assert any(hook in line for line in ours)
    assert not any("hidden-in-the-url" in line or "whsec_" in line for line in ours)


def test_old_messages_are_forgotten(sender: Sender, receiver: Receiver) -> None:
    """With their attempts; one that is still on its way stays."""
    hook = sender.hook(receiver)
    sender.test(hook)
    sender.courier().run()
    sender.test(hook)
    with sender.database.write() as session:
        session.execute(update(WebhookMessage).values(created_at=now() - timedelta(days=31)))
    sender.test(hook)
    forget_old(sender.database, sender.courier().settings)
    assert [delivery.status for delivery in sender.deliveries(hook)] == ["pending", "pending"]
    with sender.database.read() as session:
        assert session.scalars(select(WebhookAttempt)).all() == []
