"""Killed processes of the service: while versions change, a painter and a gateway are killed, and no request is lost.

A request that was in the killed process is told to come again (503 with Retry-After), which its client does. A small
sample runs among the ordinary tests, the whole with `make accept`.
"""

import queue
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from aai.proof import read_made
from pipelines.registry import versions
from tests.e2e.test_rollover import Clients, another, registry_of
from tests.hostile import wav
from tests.pipelines.test_serve import HEADERS, Service, serving

LOST_S = 120
"""A request that is not answered after so long is lost."""


@dataclass
class Asked:
    """One picture that a client wants, and every answer that it got until it had it."""

    seed: int
    tries: list[tuple[float, int, str]] = field(default_factory=list)
    """(when, status or 0 for a broken connection, code of the refusal and Retry-After)."""
    model: str = ""
    """Who painted it; empty = nobody."""
    wrong: str = ""
    """An answer that no client can do anything with."""


class Insistent(Clients):
    """Clients that want `pictures` pictures, come again when they are told to, and share what is left among them."""

    def __init__(self, running: Service, count: int, pictures: int, steps: int) -> None:
        super().__init__(running, count)
        self.steps, self.wanted = steps, [Asked(seed) for seed in range(pictures)]
        self._left: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        for asked in self.wanted:
            self._left.put(asked)

    def _ask(self) -> None:
        with httpx.Client(headers=HEADERS, timeout=LOST_S) as client:
            while True:
                try:
                    asked = self._left.get_nowait()
                except queue.Empty:
                    return
                end_s = time.monotonic() + LOST_S
                while not (asked.model or asked.wrong) and time.monotonic() < end_s:
                    self._try(client, asked)

    def _try(self, client: httpx.Client, asked: Asked) -> None:
        data = {"steps": str(self.steps), "seed": str(asked.seed)}
        try:
            answer = client.post(f"{self.running.url}/v1/generate", files={"audio": wav()}, data=data)
        except httpx.HTTPError as error:
            asked.tries.append((time.monotonic(), 0, repr(error)))
            time.sleep(1)
            return
        wait, plain = answer.headers.get("retry-after", ""), answer.headers.get("content-type") != "application/json"
        what = "no code" if plain else f"{answer.json()['error']['code']}, again in {wait} s"
        asked.tries.append((time.monotonic(), answer.status_code, what))
        if answer.status_code == 200:
            made = read_made(answer.content)
            asked.model = answer.headers["x-aai-model"]
            asked.wrong = "" if f"{made['model']}@champion" == asked.model else f"{asked.model} says {made}"
            self.answers.append((time.monotonic(), 200, asked.model))
        elif wait:
            time.sleep(int(wait))
        else:
            asked.wrong = f"{answer.status_code} {answer.text[:200]}"

    def refused(self) -> Counter[str]:
        """The tries that brought no picture, by status, code and Retry-After."""
        tries = [one for asked in self.wanted for one in asked.tries]
        return Counter(f"{status} {what}" for _, status, what in tries if status != 200)

    def done(self) -> int:
        """Pictures that are painted."""
        return len(self.answers)

    def wait_until_done(self, pictures: int) -> None:
        """Until so many are painted."""
        end_s = time.monotonic() + 2 * LOST_S
        while self.done() < pictures:
            assert time.monotonic() < end_s, (self.done(), self.refused())
            time.sleep(0.05)


def replica(running: Service, deployment: str) -> psutil.Process:
    """The process of a deployment's replica, among those that this very service started."""
    config = str(running.bundle.parent / "serve.yaml")
    (parent,) = [one for one in psutil.process_iter(["cmdline"]) if config in (one.info["cmdline"] or [])]
    end_s = time.monotonic() + 60
    while True:
        for process in parent.children(recursive=True):
            try:
                if f"ServeReplica:aai:{deployment}" in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        assert time.monotonic() < end_s, f"{deployment} has no process"
        time.sleep(0.2)


def kill(running: Service, deployment: str) -> None:
    """Kills a replica as a machine's failure does."""
    process = replica(running, deployment)
    process.kill()
    process.wait(20)


def aliased(running: Service) -> int:
    """The version that the alias names."""
    return versions.aliases(registry_of(running), "tiny")["champion"]


def disturbed(asking: Insistent, events: tuple[str | int, ...]) -> list[str]:
    """Lets each event happen after so many pictures: an alias moves, or a process is killed. Says what followed."""
    cfg, part, at = registry_of(asking.running), len(asking.wanted) // (len(events) + 1), []
    for number, event in enumerate(events, 1):
        asking.wait_until_done(number * part)
        at.append(time.monotonic())
        if isinstance(event, int):
            versions.set_alias(cfg, "champion", event)
        else:
            kill(asking.running, event)
    for thread in asking.threads:
        thread.join(3 * LOST_S)
    said = []
    for number, (event, at_s) in enumerate(zip(events, at, strict=True)):
        if isinstance(event, str):
            next_s = min((one for one, _, _ in asking.answers if one > at_s), default=float("inf"))
            said.append(f"kill -9 of the {event}: the next picture after {next_s - at_s:.1f} s")
        else:
            moves = [later for later, other in zip(at, events, strict=True) if later > at_s and isinstance(other, int)]
            span = [one for one in asking.answers if at_s < one[0] < min(moves, default=float("inf"))]
            old = [one for one, _, model in span if f"/{event}@" not in model]
            last_s = max(old, default=at_s) - at_s
            said.append(f"alias moved to version {event}: the last picture of the old one after {last_s:.1f} s")
            assert len(old) < len(span), f"event {number}: nothing was painted by version {event}"
    return said


def check(running: Service, folder: Path, clients: int, pictures: int, steps: int, kinds: str) -> None:
    """No request is lost, none is refused otherwise than with 503 and Retry-After; prints what was seen.

    kinds: of the events, in their order: n(ew version), b(ack), P(ainter killed), G(ateway killed).
    """
    first = aliased(running)
    new = versions.register(registry_of(running), another(running.bundle, folder / "new"), {}, {})
    events = {"n": new, "b": first, "P": "Painter", "G": "Gateway"}
    with Insistent(running, clients, pictures, steps) as asking:
        said = disturbed(asking, tuple(events[kind] for kind in kinds))
    models = Counter(asked.model for asked in asking.wanted)
    print("", *said, f"{clients} clients, {pictures} pictures by {dict(models)}", sep="\n")
    print(f"tries that brought none: {dict(asking.refused())}")
    assert [asked for asked in asking.wanted if asked.wrong or not asked.model] == []
    assert set(models) == {f"tiny/{version}@champion" for version in (first, new)}
    assert set(asking.refused()) <= {"503 no_painter, again in 2 s", "503 no_gateway, again in 2 s"}
    assert asking.refused()["503 no_gateway, again in 2 s"] > 0
    assert asking.refused().total() <= clients * (kinds.count("P") + kinds.count("G"))


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with room for all clients."""
    with serving(tmp_path_factory.mktemp("kills"), max_queued_requests=100) as running:
        yield running


@pytest.mark.timeout(600)
def test_m2_a_killed_painter_and_a_killed_gateway_lose_no_request(patient: Service, tmp_path: Path) -> None:
    check(patient, tmp_path, clients=8, pictures=60, steps=2, kinds="PnG")


@pytest.mark.accept
@pytest.mark.timeout(1200)
def test_m2_kills_during_a_promotion_and_a_rollback_lose_no_request(patient: Service, tmp_path: Path) -> None:
    check(patient, tmp_path, clients=64, pictures=400, steps=8, kinds="nPGbPG")
