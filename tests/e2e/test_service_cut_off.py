"""N9: nodes of the service whose network is cut for a minute: no picture is lost, no request hangs beyond its time."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from pipelines.service import proxy
from pipelines.service.keys import KEY_VARIABLE
from tests.e2e.test_nodes_cut_off import Fleet
from tests.hostile import wav
from tests.pipelines.test_serve import HEADERS, KEY, Service, serving

TIMEOUT_S, PROXY_S = 20.0, 10.0
"""`limits.request_timeout_s`, and how much later Serve's proxy ends what hangs."""
CUT_S, BACK_S = 60.0, 400.0


@dataclass(frozen=True)
class Try:
    """One answer to a request for a picture."""

    begin_s: float
    end_s: float
    told: str
    model: str
    """Who painted it."""


class Patient:
    """Clients that ask for one picture after another, with a pause, and for each again until they have it."""

    def __init__(self, url: str, count: int, pause_s: float = 0) -> None:
        self.url, self.pause_s, self.stopped = url, pause_s, threading.Event()
        self.pictures: list[list[Try]] = []
        """The tries for each picture."""
        self.threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> "Patient":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(4 * TIMEOUT_S)

    def _ask(self) -> None:
        with httpx.Client(headers=HEADERS, timeout=3 * TIMEOUT_S) as client:
            while not self.stopped.wait(self.pause_s):
                tries: list[Try] = []
                self.pictures.append(tries)
                while not tries or (tries[-1].told != "200" and not self.stopped.wait(1)):
                    begin_s = time.monotonic()
                    told, model = self._try(client)
                    tries.append(Try(begin_s, time.monotonic(), told, model))

    def _try(self, client: httpx.Client) -> tuple[str, str]:
        try:
            answer = client.post(f"{self.url}/v1/generate", files={"audio": wav()}, data={"steps": "2"})
        except httpx.HTTPError as error:
            return repr(error), ""
        if answer.status_code == 200:
            return "200", answer.headers["x-aai-model"]
        return f"{answer.status_code} {answer.text[:120]} again in {answer.headers.get('retry-after')} s", ""

    def tries(self) -> list[Try]:
        """All that have an answer."""
        return [one for tries in list(self.pictures) for one in tries]

    def wait_for_pictures(self, count: int, since_s: float, within_s: float) -> float:
        """Seconds until so many of them were asked for and painted since a moment."""
        end_s = since_s + within_s
        while sum(one.told == "200" and one.begin_s > since_s for one in self.tries()) < count:
            assert time.monotonic() < end_s, Counter(one.told for one in self.tries())
            time.sleep(0.1)
        return time.monotonic() - since_s


def painters(running: Service) -> int:
    """How many there are, as the service tells; -1 = it tells nothing."""
    try:
        return int(httpx.get(f"{running.url}/healthz", timeout=5).json()["replicas"])
    except (httpx.HTTPError, KeyError):
        return -1


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A head and three nodes that have what the service wants in their environment."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "100")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(proxy.VARIABLE, proxy.PLACE)
    with ExitStack() as stack:
        found = Fleet(stack)
        for _ in range(3):
            found.add()
        yield found


def summary(clients: Patient, begin_s: float, back_s: float) -> str:
    """What clients saw of a cut."""
    tries = clients.tries()
    during = Counter(one.told for one in tries if begin_s < one.end_s < back_s)
    after = Counter(one.told for one in tries if one.end_s > back_s)
    ends = sorted(one.end_s for one in tries if one.told == "200")
    longest = max(one.end_s - one.begin_s for one in tries)
    gap = max(b - a for a, b in pairwise(ends))
    told = f"while it was: {dict(during)}\nafter it was: {dict(after)}\n"
    return f"{told}longest request {longest:.1f} s, longest time without a picture {gap:.1f} s"


@pytest.mark.accept
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["Painter", "Gateway"])
def test_n9_the_service_while_a_node_of_it_is_cut_off(fleet: Fleet, tmp_path: Path, kind: str) -> None:
    cluster = {"address": fleet.address, "num_workers": 2}
    limits = {"request_timeout_s": TIMEOUT_S}
    with serving(tmp_path, cluster=cluster, gateways=2, limits=limits, max_queued_requests=100) as running:
        held = {each: fleet.network.holders(f"ServeReplica:aai:{each}") for each in ("Painter", "Gateway")}
        name = held[kind][0]
        with Patient(running.url, 4) as clients:
            clients.wait_for_pictures(10, time.monotonic(), 120)
            begin_s = time.monotonic()
            fleet.cut(name, CUT_S)
            back_s = time.monotonic()
            print(f"\n{held}; {name} was cut off for {CUT_S:g} s", summary(clients, begin_s, back_s), sep="\n")
            painted_s = clients.wait_for_pictures(20, back_s, BACK_S)
            while painters(running) != 2 and time.monotonic() < back_s + BACK_S:
                time.sleep(0.5)
            whole_s = time.monotonic() - back_s
            clients.wait_for_pictures(10, time.monotonic(), 120)
    print(summary(clients, begin_s, back_s))
    print(f"back: 20 pictures {painted_s:.1f} s after, two painters {whole_s:.1f} s after")
    tries = clients.tries()
    assert whole_s < BACK_S
    assert [one for one in clients.pictures if not one or one[-1].told != "200"] == []
    assert max(one.end_s - one.begin_s for one in tries) < TIMEOUT_S + PROXY_S + 2
    assert {one.told[:3] for one in tries} <= {"200", "503"}
    assert [one for one in tries if one.told[:3] == "503" and "again in None" in one.told] == []
