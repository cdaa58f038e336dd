"""A receiver of webhooks: checks each signature, ignores what it has seen, answers at once, prints one line a message.

    pip install standardwebhooks
    WEBHOOK_SECRET=whsec_... python examples/webhook_receiver.py 8080

Put it behind something that speaks TLS. Several secrets, separated by spaces, are for the days of a rotation.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

LARGEST = 1 << 20  # bytes of a body; ours have some hundred
REMEMBERED = 10_000  # ids; messages come again for three days at most, so size this for your own traffic


class Inbox:
    """Messages whose signature is right, each once."""

    def __init__(self, secrets: list[str]) -> None:
        self.verifiers = [Webhook(secret) for secret in secrets]
        self.seen: OrderedDict[str, None] = OrderedDict()

    def take(self, body: bytes, headers: dict[str, str]) -> dict[str, Any] | None:
        """The message, or None if it came before. WebhookVerificationError if nobody we know has sent it."""
        message = self._verified(body, headers)
        message_id = headers["webhook-id"]
        if message_id in self.seen:
            return None
        self.seen[message_id] = None
        if len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return message

    def _verified(self, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        refused = WebhookVerificationError("no secret")
        for verifier in self.verifiers:
            try:
                return dict(verifier.verify(body, headers))
            except WebhookVerificationError as error:
                refused = error
        raise refused


def handler(inbox: Inbox) -> type[BaseHTTPRequestHandler]:
    """What answers requests: 204 taken (or taken before), 401 not signed by a secret that we know."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            if length > LARGEST:
                self._answer(413)
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                message = inbox.take(self.rfile.read(length), headers)
            except (WebhookVerificationError, ValueError):
                self._answer(401)
                return
            self._answer(204)  # first the answer; work that takes long belongs into a queue of your own
            if message is not None:
                print(json.dumps(message), flush=True)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    """Listen on the loopback interface until Ctrl-C."""
    secrets = os.environ.get("WEBHOOK_SECRET", "").split()
    if not secrets or len(sys.argv) != 2:
        sys.exit("usage: WEBHOOK_SECRET=whsec_... python examples/webhook_receiver.py PORT (0 picks one)")
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), handler(Inbox(secrets)))
    print(f"listening on http://127.0.0.1:{server.server_address[1]}/", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
