"""A receiver of webhooks: `python -m benchmarks.chaos.receiver PORT FILE`, the secret in its environment.

Each message whose signature is right is on disk before it is answered, so what was answered was received.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

SECRET = "CHAOS_WEBHOOK_SECRET"


def received(file: Path) -> list[dict[str, Any]]:
    """Every message that was answered, and its id under `webhook-id`; one that came twice is there twice."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _handler(verifier: Webhook, descriptor: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                message = verifier.verify(body, headers)
            except WebhookVerificationError:
                self._answer(401)
                return
            self._keep({"webhook-id": headers["webhook-id"], **message})
            self._answer(204)

        def _keep(self, message: Mapping[str, Any]) -> None:
            os.write(
                descriptor, (json.dumps(message) + "\n").encode()
            )  # one write: whole lines, from any thread
            os.fsync(descriptor)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    """Until it is killed."""
    port, file = sys.argv[1:]
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    handler = _handler(Webhook(os.environ[SECRET]), descriptor)
    ThreadingHTTPServer(("127.0.0.1", int(port)), handler).serve_forever()


if __name__ == "__main__":
    main()
