"""What can go wrong between a program and the service."""

from __future__ import annotations

from typing import Any

import httpx


class ClientError(Exception):
    """Base of every error of this client; `fix` says what to do, when there is one thing to do."""

    fix: str | None = None


class UnreachableError(ClientError):
    """No answer came: nothing listens there, or the connection kept breaking."""

    def __init__(self, base_url: str, cause: Exception) -> None:
        super().__init__(f"The service at {base_url} cannot be reached ({cause or type(cause).__name__}).")
        self.fix = "Start it with `seuf up`, or give its address with --url or SEUF_URL."


class DownloadError(ClientError):
    """A checkpoint could not be fetched whole; nothing was put in its place."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


class ApiError(ClientError):
    """The service refused a request.

    Attributes:
        status: HTTP status.
        code: stable snake_case name, safe to match on.
        detail: what is wrong.
        fix: what to do, when there is one thing to do.
        errors: per offending field {pointer | parameter, code, detail, fix?, line?}.
        request_id: what to quote when asking about this error.
    """

    def __init__(self, problem: dict[str, Any]) -> None:
        self.problem = problem
        self.status = int(problem.get("status", 0))
        self.code = str(problem.get("code", "unknown"))
        self.detail = str(problem.get("detail", ""))
        self.fix = problem.get("fix")
        self.errors: list[dict[str, Any]] = problem.get("errors", [])
        self.request_id: str | None = problem.get("request_id")
        super().__init__(self.detail)

    @classmethod
    def from_response(cls, response: httpx.Response) -> ApiError:
        """The problem of a response whose body was read; a proxy's HTML becomes a problem too."""
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict) or "detail" not in problem:
            # Without its query: that of an object store's address is what opens the file.
            url = response.request.url.copy_with(query=None)
            detail = f"{response.request.method} {url} answered {response.status_code}."
            problem = {"status": response.status_code, "code": "unexpected_answer", "detail": detail}
        return cls(problem)
