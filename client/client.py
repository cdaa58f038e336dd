"""`Client`: one method per route, typed answers, retries where repeating is harmless."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from uuid import uuid4

import httpx

from client import sse
from client.audit import AuditLog
from client.download import Progress, download
from client.errors import ApiError, DownloadError, UnreachableError
from client.types import (
    Attribution,
    Checkpoint,
    Estimate,
    Event,
    File,
    Format,
    Job,
    JobLimits,
    Metrics,
    Model,
    Page,
    Purpose,
    Submit,
)
from client.upload import PARTS_OVER, send_in_parts
from client.webhooks import Webhooks

RETRIES = 4  # of a GET whose connection broke: after .2, .4, .8 and 1.6 seconds
# The service sends a comment at least every 15 s; a stream silent for longer than this is dead.
STREAM_SILENCE = 45.0
# A list of examples goes into the body, up to the service's limit of 1 MiB; a string is the id of a file.
ExampleSet = str | list[dict[str, Any]]


class Client:
    """A connection to one service.

    Args:
        base_url: address of the service, such as http://127.0.0.1:8321
        api_key: a key of that service, `seuf_...`
        timeout: seconds to wait for an answer (uploads and downloads count per chunk)

    Raises (every method):
        ApiError: the service refused; carries its problem document.
        UnreachableError: no answer came, after retries where repeating is harmless.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout: float = 30.0) -> None:
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}", "User-Agent": "seuf-client"}
        self._timeout = timeout
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout)
        self._elsewhere = httpx.Client(timeout=timeout, follow_redirects=True)
        self.audit = AuditLog(self._get, self._lines)
        self.webhooks = Webhooks(self._get, self._change)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._elsewhere.close()

    # Files

    def upload(
        self,
        path: str | Path,
        purpose: Purpose,
        *,
        format: Format | None = None,  # noqa: A002  (the field's name)
        progress: Progress | None = None,
    ) -> File:
        """Send a set to the service, which checks every line of it.

        A file over 64 MiB, or over what the service takes at once, goes in parts; the same call after a cut sends what
        is missing. `format`: where the file's extension does not say it.
        """
        path = Path(path)
        if path.stat().st_size <= PARTS_OVER:
            try:
                return self._upload_at_once(path, purpose, format)
            except ApiError as error:
                if error.code != "file_too_large":
                    raise
        return send_in_parts(self._ask, path, purpose, format, progress)

    def _upload_at_once(self, path: Path, purpose: Purpose, format: Format | None) -> File:  # noqa: A002
        fields = {"purpose": purpose} if format is None else {"purpose": purpose, "format": format}
        with path.open("rb") as stream:
            parts = {"file": (path.name, stream, "application/octet-stream")}
            request = self._http.build_request("POST", "/files", data=fields, files=parts)
            return cast("File", self._send(request).json())

    def file(self, file_id: str) -> File:
        """One uploaded file."""
        return cast("File", self._get(f"/files/{file_id}"))

    def files(self, *, cursor: str | None = None, limit: int = 20) -> Page[File]:
        """One page of files, newest first."""
        return cast("Page[File]", self._get("/files", cursor=cursor, limit=limit))

    def delete_file(self, file_id: str) -> None:
        """Delete a file; jobs that used it keep only its digest."""
        self._send(self._http.build_request("DELETE", f"/files/{file_id}"))

    # Models

    def register_model(self, name: str, path: str | Path) -> Model:
        """Register a model folder; the path is one on the service's machine."""
        body = {"name": name, "path": str(path)}
        return cast("Model", self._create("/models", body))

    def model(self, name_or_id: str) -> Model:
        """One registered model."""
        return cast("Model", self._get(f"/models/{name_or_id}"))

    def models(self, *, cursor: str | None = None, limit: int = 20) -> Page[Model]:
        """One page of models, newest first."""
        return cast("Page[Model]", self._get("/models", cursor=cursor, limit=limit))

    # Jobs

    def submit(
        self,
        model: str,
        forget_set: ExampleSet,
        *,
        retain_set: ExampleSet | None = None,
        evaluation_set: ExampleSet | None = None,
        method: dict[str, Any] | None = None,
        limits: JobLimits | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Job:
        """Start a job; each set is the id of an uploaded file or a list of examples."""
        body = _job(model, forget_set, retain_set, evaluation_set, method)
        if limits is not None:
            body["limits"] = limits
        if metadata is not None:
            body["metadata"] = metadata
        return cast("Job", self._create("/jobs", body))

    def estimate(
        self,
        model: str,
        forget_set: ExampleSet,
        *,
        retain_set: ExampleSet | None = None,
        evaluation_set: ExampleSet | None = None,
        method: dict[str, Any] | None = None,
    ) -> Estimate:
        """What `submit` with the same arguments would read, hold, write and take; creates nothing."""
        body = _job(model, forget_set, retain_set, evaluation_set, method)
        request = self._http.build_request("POST", "/jobs/estimate", json=body)
        return cast("Estimate", self._send(request).json())

    def job(self, job_id: str) -> Job:
        """One job as it stands now."""
        return cast("Job", self._get(f"/jobs/{job_id}"))

    def jobs(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Page[Job]:
        """One page of jobs, newest first."""
        return cast("Page[Job]", self._get("/jobs", status=status, model=model, cursor=cursor, limit=limit))

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; a running one is `cancelling` until its worker has let go."""
        return cast("Job", self._send(self._http.build_request("POST", f"/jobs/{job_id}/cancel")).json())

    def retry(self, job_id: str) -> Job:
        """A new job like a failed or cancelled one, which goes on from its last training checkpoint."""
        return cast("Job", self._create(f"/jobs/{job_id}/retry", None))

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Every event after number `after`, live, until the job's last one; reconnects by itself."""
        failures = 0
        while True:
            try:
                with self._stream(job_id, after) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return  # the job is over and `after` was its last event
                    if response.is_error:
                        response.read()
                        raise ApiError.from_response(response)
                    for message in sse.messages(response.iter_lines()):
                        after, failures = int(message.id), 0
                        yield cast("Event", json.loads(message.data))
            except httpx.TransportError as error:
                failures += 1
                if failures > RETRIES:
                    raise UnreachableError(self.base_url, error) from error
                time.sleep(0.2 * 2**failures)

    def attribution(self, job_id: str) -> Attribution:
        """Which experts serve the forget set."""
        return cast("Attribution", self._get(f"/jobs/{job_id}/attribution"))

    def heatmap(self, job_id: str) -> str:
        """The attribution as a picture, layer x expert: the text of an SVG file."""
        request = self._http.build_request("GET", f"/jobs/{job_id}/attribution.svg")
        return _checked(self._repeat(request)).text

    def metrics(self, job_id: str) -> Metrics:
        """What was measured before and after."""
        return cast("Metrics", self._get(f"/jobs/{job_id}/metrics"))

    # Checkpoints

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """The files of a checkpoint and what changed against its base model."""
        return cast("Checkpoint", self._get(f"/checkpoints/{checkpoint_id}"))

    def download(self, checkpoint_id: str, folder: str | Path, *, progress: Progress | None = None) -> Path:
        """Fetch a checkpoint into `folder`, resuming and checking; the folder appears only when complete."""
        return download(self._open, self.checkpoint(checkpoint_id), Path(folder), progress)

    # The service itself

    def capabilities(self) -> dict[str, Any]:
        """Architectures, objectives, scopes and limits of this service."""
        return cast("dict[str, Any]", self._get("/capabilities"))

    def ready(self) -> dict[str, Any]:
        """Whether each part of the service works; an unready service answers too."""
        response = self._repeat(self._http.build_request("GET", "/readyz"))
        return cast("dict[str, Any]", response.json())

    # Plumbing

    def _get(self, path: str, **query: str | int | None) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        response = self._repeat(self._http.build_request("GET", path, params=given))
        return _checked(response).json()

    def _change(self, method: str, path: str, body: Any) -> Any:
        answer = self._send(self._http.build_request(method, path, json=body))
        return answer.json() if answer.content else None

    def _ask(
        self,
        method: str,
        path: str,
        *,
        repeat: bool,
        json: Any = None,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        patient: bool = False,
    ) -> Any:
        # Completing an upload reads all of it: minutes, for gigabytes.
        timeout = httpx.Timeout(self._timeout, read=None) if patient else self._timeout
        request = self._http.build_request(
            method, path, json=json, content=content, headers=headers, timeout=timeout
        )
        answer = _checked(self._repeat(request) if repeat else self._once(request))
        return answer.json() if answer.content else None

    def _lines(self, path: str) -> Iterator[bytes]:
        with self._http.stream("GET", path) as response:
            if response.is_error:
                response.read()
                raise ApiError.from_response(response)
            yield from (line.encode() for line in response.iter_lines())

    def _repeat(self, request: httpx.Request) -> httpx.Response:
        """Send a request that is safe to repeat, over broken connections."""
        for attempt in range(RETRIES):
            try:
                return self._http.send(request)
            except httpx.TransportError:
                time.sleep(0.2 * 2**attempt)
        return self._once(request)

    def _once(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self._http.send(request, stream=stream)
        except httpx.TransportError as error:
            raise UnreachableError(self.base_url, error) from error

    def _send(self, request: httpx.Request) -> httpx.Response:
        """Send a request that changes something: once, since its answer may be what got lost."""
        return _checked(self._once(request))

    def _create(self, path: str, body: Any) -> Any:
        """Make something once, over broken connections: repeated under its own key, a request gets its first answer."""
        headers = {"Idempotency-Key": str(uuid4())}
        request = self._http.build_request("POST", path, json=body, headers=headers)
        for _ in range(RETRIES):
            answer = self._repeat(request)
            if answer.status_code != httpx.codes.CONFLICT or answer.json()["code"] != "request_in_flight":
                break
            time.sleep(float(answer.headers["Retry-After"]))  # the one whose answer was lost is still at work
        return _checked(answer).json()

    def _open(self, path: str, headers: dict[str, str]) -> httpx.Response:
        response = self._http.send(self._http.build_request("GET", path, headers=headers), stream=True)
        if response.next_request is None:
            return response
        response.close()
        return self._follow(response.request.url, response.next_request.url, headers)

    def _follow(self, from_url: httpx.URL, url: httpx.URL, headers: dict[str, str]) -> httpx.Response:
        """The same bytes from the object store that the service names. It never sees our key."""
        if from_url.scheme == "https" and url.scheme != "https":
            raise DownloadError(
                f"The service sends this download on to {url.host} without TLS.",
                "Have its operator set an https address as SEUF_S3_PUBLIC_ENDPOINT_URL.",
            )
        # If-Range names the service's tag of the file; the store has another one. The digest decides at the end.
        asked = {name: value for name, value in headers.items() if name != "If-Range"}
        return self._elsewhere.send(self._elsewhere.build_request("GET", url, headers=asked), stream=True)

    def _stream(self, job_id: str, after: int) -> AbstractContextManager[httpx.Response]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._timeout, read=STREAM_SILENCE)
        return self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=timeout)


def _job(
    model: str,
    forget_set: ExampleSet,
    retain_set: ExampleSet | None,
    evaluation_set: ExampleSet | None,
    method: dict[str, Any] | None,
) -> Submit:
    body = Submit(model=model, forget_set=_example_set(forget_set))
    if retain_set is not None:
        body["retain_set"] = _example_set(retain_set)
    if evaluation_set is not None:
        body["evaluation_set"] = _example_set(evaluation_set)
    if method is not None:
        body["method"] = method
    return body


def _example_set(given: ExampleSet) -> dict[str, Any]:
    return {"file": given} if isinstance(given, str) else {"examples": given}


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise ApiError.from_response(response)
    return response
