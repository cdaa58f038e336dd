"""The duty that sends webhooks, by the rules of Standard Webhooks (standardwebhooks.com).

At least once and in no promised order: a message is taken for a while, sent, and then recorded, so a process that is
killed in between leaves it to be sent again under the same webhook-id. Each receiver has a thread of its own and gets
one message at a time, so a slow one delays nobody else.
"""

import hashlib
import hmac
import json
import logging
import ssl
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from secrets import SystemRandom
from typing import Final

import httpcore

from seuf_core.version import __version__
from store import webhooks
from store.database import Database
from store.receivers import ReceiverRefusedError
from store.sealed import PREFIX, SealedError, Sealer
from store.settings import Settings
from store.tables import now
from store.webhooks import Outcome, Parcel
from worker.posting import NoAddressError, Resolve, post, resolve

log = logging.getLogger(__name__)

TURN: Final = 50
"""Messages that a receiver gets before others may have its thread."""
JITTER: Final = 0.2
"""Of a pause, up or down, so that what failed together does not come back together."""
LOOK_SECONDS: Final = 0.2
"""Between two looks for receivers that wait, while some are being told."""
MARGIN_SECONDS: Final = 30
"""Past its deadline, in which a sender must have recorded how it went."""
DOWN_SECONDS: Final = 5
"""Between two messages to a receiver that does not take them."""
_random = SystemRandom()


def deliver(database: Database, settings: Settings) -> None:
    """Send what is due until nothing is."""
    Courier(database, settings).run()


def forget_old(database: Database, settings: Settings) -> None:
    """Delete messages that are older than the settings keep them."""
    before = now() - timedelta(days=settings.webhook_log_days)
    while True:
        with database.write() as session:
            if not webhooks.forget(session, before):
                return


def body_of(parcel: Parcel) -> bytes:
    """What is sent: type, time of the event, and data with ids, state and codes."""
    at = parcel.at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
    told = {"type": parcel.type, "timestamp": at, "data": parcel.data}
    return json.dumps(told, separators=(",", ":")).encode()


def signed(message_id: str, at: int, body: bytes, secrets: Sequence[str]) -> Mapping[str, str]:
    """The three headers; `at` in seconds since 1970, one signature for each secret (whsec_...)."""
    content = f"{message_id}.{at}.".encode() + body
    signatures = []
    for secret in secrets:
        key = b64decode(secret.removeprefix(PREFIX))
        digest = hmac.new(key, content, hashlib.sha256).digest()
        signatures.append(f"v1,{b64encode(digest).decode()}")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(signatures),
    }


class Courier:
    """Sends what is due, at most `webhook_concurrency` receivers at a time."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        resolver: Resolve = resolve,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.database = database
        self.settings = settings
        self.receivers = settings.receivers()
        self.sealer = Sealer(settings.secret_bytes())
        self.pauses = settings.webhook_pauses()
        self.resolver = resolver
        self.context = context
        self._done = threading.Event()

    def run(self) -> None:
        """Until nothing is due and nobody is being told."""
        threads: dict[str, threading.Thread] = {}
        while True:
            self._done.clear()
            threads = {webhook: thread for webhook, thread in threads.items() if thread.is_alive()}
            free = self.settings.webhook_concurrency - len(threads)
            waiting: Sequence[str] = ()
            if free > 0:
                with self.database.read() as session:
                    waiting = webhooks.due(session, list(threads), free)
            for webhook in waiting:
                # Daemons: a process that is stopped may leave a message to be sent again, and does not wait.
                thread = threading.Thread(target=self._turn, args=(webhook,), name=webhook, daemon=True)
                threads[webhook] = thread
                thread.start()
            if not threads:
                return
            self._done.wait(LOOK_SECONDS)

    def _turn(self, webhook_id: str) -> None:
        """Some messages of one receiver, until one is not taken."""
        try:
            for _ in range(TURN):
                if not self._next(webhook_id):
                    return
        except Exception:
            log.exception("webhook %s: its turn failed; what was being sent will be sent again", webhook_id)
        finally:
            self._done.set()

    def _next(self, webhook_id: str) -> bool:
        """Send the next message; True: it was taken, and there may be more."""
        with self.database.write() as session:
            parcel = webhooks.take(
                session, webhook_id, self.settings.webhook_timeout_seconds + MARGIN_SECONDS
            )
        if parcel is None:
            return False
        outcome = self.send(parcel)
        pause = self._pause(parcel.number)
        again = timedelta(seconds=pause) if pause is not None else None
        with self.database.write() as session:
            webhooks.record(
                session, parcel, outcome, again, timedelta(days=self.settings.webhook_disable_days)
            )
            if not outcome.delivered:
                webhooks.postpone(session, webhook_id, min(DOWN_SECONDS, self.pauses[0]))
        log.log(
            logging.INFO if outcome.delivered else logging.WARNING,
            "webhook %s: %s attempt %d: %s",
            webhook_id,
            parcel.message_id,
            parcel.number,
            outcome.status_code or outcome.error,
        )
        return outcome.delivered

    def send(self, parcel: Parcel) -> Outcome:
        """One attempt, whatever comes of it."""
        began, at = time.monotonic(), now()
        status: int | None = None
        error: str | None = None
        try:
            status = self._post(parcel, at)
        except (ReceiverRefusedError, SealedError) as refused:
            error = refused.message
        except NoAddressError:
            error = "Its name has no address."
        except httpcore.TimeoutException:
            error = f"No answer within {self.settings.webhook_timeout_seconds:g} s."
        except httpcore.NetworkError as broken:
            error = _why(broken)
        except httpcore.ProtocolError:
            error = "What came back is not HTTP."
        return Outcome(at, round((time.monotonic() - began) * 1000), status, error)

    def _post(self, parcel: Parcel, at: datetime) -> int:
        body = body_of(parcel)
        secrets = [self.sealer.open(sealed) for sealed in parcel.secrets]
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"seuf/{__version__}",
            **signed(parcel.message_id, int(at.timestamp()), body, secrets),
        }
        return post(
            self.receivers,
            parcel.url,
            headers,
            body,
            self.settings.webhook_timeout_seconds,
            resolver=self.resolver,
            context=self.context,
        )

    def _pause(self, number: int) -> float | None:
        """Seconds before the attempt after `number`; None: that was the last one."""
        if number > len(self.pauses):
            return None
        return self.pauses[number - 1] * _random.uniform(1 - JITTER, 1 + JITTER)


def _why(error: httpcore.NetworkError) -> str:
    """Why there was no connection, without what a machine in between may have said."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"Its certificate is not valid: {cause.verify_message}."
        if isinstance(cause, ssl.SSLError):
            return "It does not speak TLS as we do."
        cause = cause.__cause__ or cause.__context__
    return (
        "It cannot be connected to." if isinstance(error, httpcore.ConnectError) else "The connection broke."
    )
