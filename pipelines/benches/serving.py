"""The service beside the painter alone: one request at a time and with batches, asked alike, in turns.

Two services (`aai serve`, one painter each) and a process with the bare painter are there at once. In each round all
are given each load, every second round backwards; another process asks. With the fewest clients they change after each
turn of the verbs: what a service adds is less than what a busy machine changes within seconds.
"""

import itertools
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from aai import storage
from aai.errors import UserError
from aai.sampling import REPAINT
from pipelines.__main__ import CONFIGS
from pipelines.benches.asking import VERBS, Load, Outcome, Reply, ask
from pipelines.benches.options import BenchConfig, ServeBenchConfig
from pipelines.benches.painter_alone import Which, paint_alone, unet_alone
from pipelines.registry import versions
from pipelines.serve import ServeConfig

BARE, ONE, BATCH = "bare", "one", "batch"
NAMES = {BARE: "bare painter", ONE: "one at a time", BATCH: "with batches"}
MANY = 8
"""Clients at which batches are compared with one at a time."""
PAIRS = ((BATCH, ONE), (ONE, BARE), (BATCH, BARE))
TURN_S = 1e-3
"""A load of so many seconds is one turn of the verbs."""
PERCENTS = (50, 95, 99)
MOST_SLOWER, LEAST_FASTER = 1.05, 2.0
"""What is asked of the service: its median beside the bare painter's, and its rate with batches beside that without."""


@dataclass(frozen=True)
class Cell:
    """One load of one variant in one round: what came of it, in one go or in several turns."""

    variant: str
    load: str
    outcomes: Sequence[Outcome]

    def answers(self) -> list[Reply]:
        """Of all turns."""
        return [each for outcome in self.outcomes for each in outcome.answers]

    def times_s(self) -> list[float]:
        """Of the pictures, in order of size."""
        return sorted(each.end_s - each.begin_s for each in self.answers() if each.code == "200")

    def per_s(self) -> float:
        """Pictures per second of the times from a turn's first request to its last picture."""
        painted, took_s = 0, 0.0
        for outcome in self.outcomes:
            if ends_s := [each.end_s for each in outcome.answers if each.code == "200"]:
                painted += len(ends_s)
                took_s += max(ends_s) - min(each.begin_s for each in outcome.answers)
        return painted / took_s if painted else 0.0


@dataclass
class Rounds:
    """What is measured, and how: the processes that ask and paint, the services, and the cells so far."""

    settings: ServeBenchConfig
    painter: Which
    batch_pictures: int
    urls: dict[str, str]
    asking: ProcessPoolExecutor
    painting: ProcessPoolExecutor
    cells: list[list[Cell]] = field(default_factory=list)
    """Of each round."""
    unet_s: list[dict[int, float]] = field(default_factory=list)
    """Of each round: seconds of a step by pictures."""
    _first: int = 0

    def count(self, repeats: int) -> int:
        """How many cells there will be."""
        opened = len(self.settings.open_shares) + 1
        return repeats * (1 + 2 * (len(self.settings.clients) + opened))

    def take(self, backwards: bool, bar: Any) -> None:
        """One round."""
        order = [BARE, ONE, BATCH][:: -1 if backwards else 1]
        self.cells.append([])
        for clients in self.settings.clients:
            if clients == min(self.settings.clients):
                self._in_turns(order, clients, bar)
                continue
            for variant in (name for name in order if name != BARE):
                self._cell(variant, closed_name(clients), bar, clients=clients)
        alone = partial(unet_alone, self.painter)
        wanted, seconds = {1, self.batch_pictures}, self.settings.cell_s / 4
        self.unet_s.append({pictures: self.painting.submit(alone, pictures, seconds).result() for pictures in wanted})
        best = {variant: self._best(variant) for variant in self.urls}
        for share in (*self.settings.open_shares, self.settings.overload):
            for variant in order:
                if variant != BARE:
                    self._cell(variant, open_name(share), bar, per_s=share * best[variant])

    def _in_turns(self, order: Sequence[str], clients: int, bar: Any) -> None:
        """A closed loop of all three, who change after each turn, for as long as a cell of each."""
        bar.set_postfix_str(f"in turns, {closed_name(clients)}")
        taken: dict[str, list[Outcome]] = {variant: [] for variant in order}
        end_s = time.monotonic() + len(order) * self.settings.cell_s
        while time.monotonic() < end_s:
            for variant in order:
                taken[variant].append(self._outcome(variant, TURN_S, clients=clients))
            order = order[::-1]
        self.cells[-1] += [Cell(variant, closed_name(clients), outcomes) for variant, outcomes in taken.items()]
        bar.update(len(order))

    def _cell(self, variant: str, name: str, bar: Any, **load: float) -> None:
        bar.set_postfix_str(f"{NAMES[variant]}, {name}")
        self.cells[-1].append(Cell(variant, name, [self._outcome(variant, self.settings.cell_s, **load)]))
        bar.update()

    def _outcome(self, variant: str, seconds: float, **load: float) -> Outcome:
        s = self.settings
        if variant == BARE:
            given = self.painter, self._first, s.steps, seconds
            outcome = Outcome(self.painting.submit(paint_alone, *given).result(), 0.0)
        else:
            asked = Load(seconds=seconds, first=self._first, steps=s.steps, **load)  # type: ignore[arg-type]
            outcome = self.asking.submit(ask, self.urls[variant], asked).result()
        self._first += len(outcome.answers)
        return outcome

    def _best(self, variant: str) -> float:
        cells = [cell for cell in self.cells[-1] if cell.variant == variant]
        best = max(cell.per_s() for cell in cells)
        if not best:
            raise RuntimeError(f"bench: {NAMES[variant]} painted nothing: {dict(codes(cells))}")
        return best


def closed_name(clients: int) -> str:
    """What a closed loop is called."""
    return f"{clients} client{'s' * (clients > 1)}"


def open_name(share: float) -> str:
    """What an open loop is called."""
    return f"open, {100 * share:.0f} %" if share < 1 else f"open, {share:g} x"


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios, and the lines of a table of all loads."""
    asked = config.serve
    values: dict[str, object] = {"bundle": asked.bundle} if asked.bundle else {}
    served = ServeConfig.load(CONFIGS / "demo" / "serve.yaml", config.overrides, values)
    cluster = config.cluster.model_copy(update={"num_workers": 1})
    # As Ray sets it for its workers: the bare painter has as many threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(cluster.cpus_per_worker))))
    folder, device = (
        versions.resolve_bundle(served.bundle, served.tracking),
        "cuda" if cluster.gpus_per_worker else "cpu",
    )
    painter = folder, device, served.dtype, served.addons
    with ExitStack() as stack:
        urls = {}
        for name, pictures in ((ONE, 1), (BATCH, served.batch_pictures)):
            changed = {"batch_pictures": pictures, "port": free_port(), "host": "127.0.0.1", "cluster": cluster}
            urls[name] = stack.enter_context(running(served.model_copy(update=changed), config.out, name))
        asking, painting = (
            stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for _ in range(2)
        )
        for url in urls.values():  # warms up
            asking.submit(ask, url, Load(seconds=0.1, clients=1, first=10**6, steps=asked.steps)).result()
        painting.submit(paint_alone, painter, 10**6, asked.steps, 0.1).result()
        rounds = Rounds(asked, painter, served.batch_pictures, urls, asking, painting)
        with tqdm(total=rounds.count(config.repeats), desc="serve", unit="cell", mininterval=1.0) as bar:
            for turn in range(config.repeats):
                rounds.take(turn % 2 == 1, bar)
    shown = {"repeats": config.repeats, **asked.model_dump(), "bundle": served.bundle}
    shown |= {"batch_pictures": served.batch_pictures, "max_queued_requests": served.max_queued_requests}
    return {"inputs": shown, **summary(rounds)}


@contextmanager
def running(settings: ServeConfig, out: str, name: str) -> Iterator[str]:
    """`aai serve` as a user starts it, until the body ends; yields its address. Its log is OUT/serve-NAME.log."""
    file, log = storage.join(out, f"serve-{name}.yaml"), storage.join(out, f"serve-{name}.log")
    storage.write_bytes(file, settings.to_yaml().encode())
    environment = {key: value for key, value in os.environ.items() if key != "AAI_API_KEY"}
    command = [sys.executable, "-m", "pipelines", "serve", "--config", file]
    with open(log, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True, env=environment)
    try:
        if not (process.stdout and process.stdout.readline()):
            raise UserError("serve.bundle", settings.bundle, "the service did not start", f"read {log}")
        yield settings.url()
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def codes(cells: Sequence[Cell]) -> Counter[str]:
    """How often each answer other than a picture came."""
    return Counter(each.code for cell in cells for each in cell.answers() if each.code != "200")


def row(cells: Sequence[Cell]) -> dict[str, Any]:
    """One load of one variant over all rounds: rates of the rounds, times of all pictures."""
    times_s = sorted(time_s for cell in cells for time_s in cell.times_s())
    each = [cell.per_s() for cell in cells]
    found: dict[str, Any] = {"variant": cells[0].variant, "load": cells[0].load, "painted": len(times_s)}
    found |= {"per_s": rounded(statistics.median(each)), "per_s_min_max": [rounded(min(each)), rounded(max(each))]}
    for percent in PERCENTS:
        at = -(-percent * len(times_s) // 100) - 1
        found[f"p{percent}_ms"] = rounded(1e3 * times_s[at]) if times_s else None
    found["not_painted"] = dict(codes(cells))
    found["asking_cpu_share"] = rounded(max(each.cpu_share for cell in cells for each in cell.outcomes))
    return found


def beside(cell: Cell, bare: Cell) -> float:
    """The median picture's time, of that of the bare painter's picture of the same verb in the same turn."""
    pairs = zip(cell.answers(), bare.answers(), strict=False)
    return statistics.median(
        (this.end_s - this.begin_s) / (that.end_s - that.begin_s) for this, that in pairs if this.code == "200"
    )


def rates(rounds: Rounds) -> tuple[list[dict[str, float]], int]:
    """Of each round: pictures per second and median seconds, by what is compared; and at how many clients."""
    clients = rounds.settings.clients
    few, many = min(clients), min(clients, key=lambda count: abs(count - MANY))
    out = []
    for cells, unet_s in zip(rounds.cells, rounds.unet_s, strict=True):
        at = {(cell.variant, cell.load): cell for cell in cells}
        alone, crowd = closed_name(few), closed_name(many)
        found = {BARE: at[BARE, alone].per_s(), ONE: at[ONE, crowd].per_s(), BATCH: at[BATCH, crowd].per_s()}
        for pictures, step_s in sorted(unet_s.items()):
            found[f"unet_of_{pictures}"] = pictures / (mean_steps(rounds.settings.steps) * step_s)
        found |= {f"{name}_p50": statistics.median(at[name, alone].times_s()) for name in (BARE, ONE, BATCH)}
        found |= {f"{name}_p50/{BARE}_p50": beside(at[name, alone], at[BARE, alone]) for name in (ONE, BATCH)}
        out.append(found)
    return out, many


def summary(rounds: Rounds) -> dict[str, Any]:
    """figures, ratios and lines: medians over the rounds, with the least and the largest."""
    by_load: dict[tuple[str, str], list[Cell]] = {}
    for cell in itertools.chain(*rounds.cells):
        by_load.setdefault((cell.load, cell.variant), []).append(cell)
    rows = [row(cells) for cells in by_load.values()]
    each, many = rates(rounds)
    unet = f"unet_of_{rounds.batch_pictures}"
    spread: dict[str, list[float]] = {}
    for name in [name for name in each[0] if "/" in name]:
        values = [found.pop(name) for found in each]
        spread[name] = [rounded(value) for value in (statistics.median(values), min(values), max(values))]
    for this, that in (*PAIRS, (BATCH, unet), (BARE, "unet_of_1"), (unet, "unet_of_1")):
        values = [found[this] / found[that] for found in each]
        spread[f"{this}/{that}"] = [rounded(value) for value in (statistics.median(values), min(values), max(values))]
    figures: dict[str, Any] = {}
    for name in each[0]:
        value = statistics.median(found[name] for found in each)
        figures |= {f"{name}_ms": rounded(1e3 * value)} if name.endswith("_p50") else {f"{name}_per_s": rounded(value)}
    figures["asking_cpu_share"] = max(one["asking_cpu_share"] for one in rows)
    figures |= {"rates_at_clients": many, "ratios_min_max": {name: found[1:] for name, found in spread.items()}}
    shown = [*lines(rows), "", *goals(spread, many), ""]
    ratios = {name: found[0] for name, found in spread.items()}
    return {"figures": {**figures, "loads": rows}, "ratios": ratios, "lines": shown}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of all loads."""
    told = [("load", "painter", "pictures/s (min to max)", "p50 ms", "p95 ms", "p99 ms", "not painted")]
    for one in rows:
        least, most = one["per_s_min_max"]
        times = ["-" if one[f"p{percent}_ms"] is None else f"{one[f'p{percent}_ms']:.0f}" for percent in PERCENTS]
        refused = ", ".join(f"{count} x {code}" for code, count in one["not_painted"].items())
        rate = f"{one['per_s']:.3g} ({least:.3g} to {most:.3g})"
        told.append((one["load"], NAMES[one["variant"]], rate, *times, refused))
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(one, widths, strict=True)).rstrip() for one in told]


def goals(spread: Mapping[str, Sequence[float]], many: int) -> list[str]:
    """What is asked, and what was found (least to largest of the rounds)."""
    slower, faster = f"{BATCH}_p50/{BARE}_p50", f"{BATCH}/{ONE}"
    asked = [
        (slower, f"median with one client, of the bare painter's (asked: at most {MOST_SLOWER})"),
        (faster, f"rate of batches at {many} clients, of that of one at a time (asked: at least {LEAST_FASTER})"),
    ]
    return [f"{spread[name][0]:.3g} ({spread[name][1]:.3g} to {spread[name][2]:.3g})  {words}" for name, words in asked]


def mean_steps(steps: int) -> float:
    """Steps that the UNet takes for a picture, over the verbs."""
    return statistics.mean(int(steps * (1 if verb == "generate" else REPAINT["img2img"])) for verb in VERBS)


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
