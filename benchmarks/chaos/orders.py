"""The jobs of a run: what is asked, when it is submitted, and which are cancelled in which phase.

A submit whose answer got lost is sent again under the same Idempotency-Key, as any careful client does.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.chaos.service import JobState, Service
from seuf_core import reference
from store.transitions import FINAL, Status

QUICK: Final[dict[str, Any]] = {"strength": "fixed", "learning_rate": 3e-3, "batch_size": 16}
SPECS: Final[dict[str, dict[str, Any]]] = {
    "difference": {**QUICK, "steps": 200, "seed": 1},
    "npo": {**QUICK, "steps": 200, "objective": "npo", "seed": 2},
    "paper": {**QUICK, "steps": 180, "preset": "paper", "seed": 3},
    "rmu": {**QUICK, "steps": 400, "objective": "rmu", "seed": 4},
    "search": {
        "learning_rate_ladder": [1e-2, 3e-3],
        "steps": 70,
        "batch_size": 16,
        "max_retain_drop": 0.9,
        "experts": 2,
        "seed": 5,
    },
}
PHASES: Final = ("queued", "claimed", "validating", "attributing", "unlearning", "evaluating", "publishing")
BACKLOG: Final = 6
"""Jobs that wait or run at a time: two workers are never idle, and there is a queue."""
LOOK_SECONDS: Final = 0.05


@dataclass
class Order:
    """One job that is asked for. `cancel_in`: the phase in which it is cancelled."""

    number: int
    spec: str
    cancel_in: str | None = None
    ids: list[str] = field(default_factory=list)
    """Of the job, and after it of each retry."""
    cancelled_in: str | None = None
    state: JobState | None = None

    @property
    def ended(self) -> bool:
        """Is its last job in a final state?"""
        return self.state is not None and self.state.status in FINAL

    @property
    def phase(self) -> str | None:
        """One of PHASES, while it waits or runs."""
        if self.state is None or self.ended:
            return None
        if self.state.status is Status.QUEUED:
            return "queued"
        return self.state.phase or "claimed"


def draw(jobs: int, rng: random.Random, specs: Sequence[str], *, cancels: int) -> list[Order]:
    """So many orders; `cancels` of them are cancelled, each in the next phase of PHASES."""
    orders = [Order(number, specs[number % len(specs)]) for number in range(jobs)]
    for turn, order in enumerate(rng.sample(orders, cancels)):
        order.cancel_in = PHASES[turn % len(PHASES)]
    return orders


@dataclass(frozen=True)
class Inputs:
    """The sets and the model, as the service knows them."""

    model: str
    files: dict[str, str]


def upload(service: Service, folder: Path) -> Inputs:
    """Train the small reference model (some seconds) and give it to the service with its sets."""
    made = reference.build(size="tiny", cache=folder)
    sets = {"forget": made.forget, "retain": made.retain, "evaluation": made.probes}
    with service.http() as http:
        model = http.post("/models", json={"name": "reference", "path": str(made.model)}).raise_for_status()
        files = {}
        for purpose, path in sets.items():
            sent = {"file": (path.name, path.read_bytes(), "application/jsonl")}
            files[purpose] = str(
                http.post("/files", data={"purpose": purpose}, files=sent).raise_for_status().json()["id"]
            )
    return Inputs(model.json()["id"], files)


@dataclass
class Ledger:
    """Submits, cancels and retries; knows how each order stands. `may_submit(n)`: is it time for the n-th?"""

    service: Service
    inputs: Inputs
    orders: list[Order]
    run: str
    may_submit: Callable[[int], bool] = lambda _: True
    resubmits: int = 0
    looked_at: float = 0.0
    refused: list[str] = field(default_factory=list)

    def body(self, order: Order) -> bytes:
        """The body of POST /jobs: the same bytes for every try of one order, as its Idempotency-Key demands."""
        sets = {f"{purpose}_set": {"file": id_} for purpose, id_ in self.inputs.files.items()}
        metadata = {"run": self.run, "order": str(order.number)}
        body = {"model": self.inputs.model, **sets, "method": SPECS[order.spec], "metadata": metadata}
        return json.dumps(body).encode()

    def headers(self, order: Order) -> dict[str, str]:
        """The same for every try of one order."""
        return {"Content-Type": "application/json", "Idempotency-Key": f"{self.run}-{order.number}"}

    @property
    def open(self) -> list[Order]:
        """Submitted, and not ended."""
        return [order for order in self.orders if order.ids and not order.ended]

    @property
    def next(self) -> Order | None:
        """The next to be submitted."""
        return next((order for order in self.orders if not order.ids), None)

    @property
    def submitted(self) -> int:
        """How many have been."""
        return sum(bool(order.ids) for order in self.orders)

    @property
    def done(self) -> bool:
        """Has everything ended?"""
        return all(order.ended for order in self.orders)

    def look(self) -> None:
        """Read the jobs, then do the one thing that is due: cancel, retry or submit."""
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return
        self.looked_at = time.monotonic()
        self.read()
        for order in self.orders:
            if self._cancel_due(order):
                self._cancel(order)
            elif _retry_due(order):
                self._retry(order)
        order = self.next
        if order is not None and len(self.open) < BACKLOG and self.may_submit(order.number):
            self.submit(order)

    def read(self) -> None:
        """How every order stands, if the database says so."""
        jobs = self.service.jobs()
        if jobs is None:
            return
        for order in self.orders:
            if order.ids:
                order.state = jobs.get(order.ids[-1])

    def submit(self, order: Order) -> None:
        """POST the job; when no answer comes, it is due again."""
        answer = self._send("/jobs", self.body(order), self.headers(order))
        if answer is not None:
            self.accept(order, answer)
        else:
            self.resubmits += 1

    def accept(self, order: Order, answer: httpx.Response) -> None:
        """Note what the service said to a submit."""
        if answer.status_code == 202:
            order.ids.append(answer.json()["id"])
        elif answer.status_code in (409, 429) or answer.status_code >= 500:
            self.resubmits += 1  # the first try is still under way, or a part of the service is away
        else:
            raise SystemExit(f"Job {order.number} was refused: {answer.text}")

    def _cancel_due(self, order: Order) -> bool:
        if order.cancel_in is None or order.cancelled_in is not None or order.phase is None:
            return False
        # A short phase may be missed: then the next one counts.
        return PHASES.index(order.phase) >= PHASES.index(order.cancel_in)

    def _cancel(self, order: Order) -> None:
        phase = order.phase
        answer = self._send(f"/jobs/{order.ids[-1]}/cancel")
        if answer is not None and answer.status_code in (202, 409):  # 409: it has ended meanwhile
            order.cancelled_in = phase

    def _retry(self, order: Order) -> None:
        answer = self._send(f"/jobs/{order.ids[-1]}/retry")
        if answer is not None and answer.status_code == 202:
            order.ids.append(answer.json()["id"])
            order.state = None
        elif answer is not None and answer.status_code < 500:
            self.refused.append(answer.text)

    def _send(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response | None:
        """POST; None when no answer came."""
        try:
            with self.service.http() as http:
                return http.post(path, content=body, headers=headers)
        except httpx.TransportError:
            return None


def _retry_due(order: Order) -> bool:
    """Only what a full disk may do to a job: nothing else may make one fail."""
    return (
        order.state is not None
        and order.state.status is Status.FAILED
        and order.state.error_code in DISK_FULL
    )


DISK_FULL: Final = frozenset({"disk_full", "DISK_FULL"})
