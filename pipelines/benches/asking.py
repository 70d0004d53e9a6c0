"""The load of `aai bench serve`: requests of all three verbs, asked from a process of its own.

In a closed loop each client asks again when it is answered. In an open loop requests come at times that are drawn
beforehand, whether others are answered or not, and a request's time counts from when it was due.
"""

import asyncio
import io
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from aai.media.waveform import encode_wav

VERBS = ("generate", "edit", "stylize")
RATE_HZ = 16_000
PICTURE_PX = 96
TIMEOUT_S = 300
AGAIN_S = 0.2
"""After a connection that broke; a refusal says itself when to come again."""


@dataclass(frozen=True)
class Form:
    """One request: a sound that no other has, so that nobody remembers it, and a picture to repaint."""

    number: int
    verb: str
    steps: int

    def wav(self) -> bytes:
        """One second of two tones."""
        time_s = np.arange(RATE_HZ) / RATE_HZ
        tones = [np.sin(2 * np.pi * (200 + shift + self.number % 5000) * time_s) for shift in (0, 313)]
        return encode_wav(8000 * (tones[0] + tones[1]), RATE_HZ)

    def png(self) -> bytes:
        """A picture of two colours."""
        pixels = np.full((PICTURE_PX, PICTURE_PX, 3), 40 + self.number % 160, np.uint8)
        pixels[PICTURE_PX // 3 :, :, 1] = 200
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        return sink.getvalue()


@dataclass(frozen=True)
class Load:
    """What is asked of a service."""

    seconds: float
    """For how long requests begin; those that are begun are waited for."""
    clients: int = 0
    """Of a closed loop; 0 = an open one."""
    per_s: float = 0.0
    """Arrivals of an open loop, on the average (Poisson)."""
    first: int = 0
    """Number of the first request: other numbers, other sounds."""
    steps: int = 20


@dataclass(frozen=True)
class Reply:
    """One request: when it began (in an open loop, was due) and ended on the monotonic clock, and what came."""

    begin_s: float
    end_s: float
    code: str
    """`200`, status and code of a refusal, or the kind of error of a broken connection."""


@dataclass(frozen=True)
class Outcome:
    """What came of a load."""

    answers: list[Reply]
    cpu_share: float
    """Of one CPU, that asking itself took: near 1 the figures are those of the asking."""


def ask(url: str, load: Load) -> Outcome:
    """Runs a load against a service, in this process."""
    begin_s, begin_cpu_s = time.monotonic(), time.process_time()
    answers = asyncio.run(_all(url, load))
    cpu_s = time.process_time() - begin_cpu_s
    return Outcome(answers, cpu_s / (time.monotonic() - begin_s))


def arrivals(load: Load) -> Iterator[float]:
    """Seconds after the begin at which requests of an open loop are due."""
    drawn, at_s = random.Random(load.first), 0.0
    while (at_s := at_s + drawn.expovariate(load.per_s)) < load.seconds:
        yield at_s


async def _all(url: str, load: Load) -> list[Reply]:
    answers: list[Reply] = []
    numbers = itertools.count(load.first)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        begin_s = time.monotonic()

        async def in_turn(offset: int) -> None:
            """A client of a closed loop; it ends with a whole turn of the verbs, so that all are asked alike."""
            while time.monotonic() < begin_s + load.seconds:
                for turn in range(len(VERBS)):
                    form = Form(next(numbers), VERBS[(offset + turn) % len(VERBS)], load.steps)
                    answer, wait_s = await _one(client, form, time.monotonic())
                    answers.append(answer)
                    await asyncio.sleep(wait_s)

        async def when_due(at_s: float) -> None:
            await asyncio.sleep(begin_s + at_s - time.monotonic())
            number = next(numbers)
            form = Form(number, VERBS[number % len(VERBS)], load.steps)
            answers.append((await _one(client, form, begin_s + at_s))[0])

        if load.clients:
            await asyncio.gather(*(in_turn(offset) for offset in range(load.clients)))
        else:
            await asyncio.gather(*(when_due(at_s) for at_s in arrivals(load)))
    return answers


async def _one(client: httpx.AsyncClient, form: Form, begin_s: float) -> tuple[Reply, float]:
    """One request, and how long its client then waits before the next."""
    files = {"audio": form.wav()} | ({} if form.verb == "generate" else {"image": form.png()})
    data = {"steps": str(form.steps), "seed": str(form.number)}
    try:
        answer = await client.post(f"/v1/{form.verb}", files=files, data=data)
    except httpx.HTTPError as error:
        return Reply(begin_s, time.monotonic(), type(error).__name__), AGAIN_S
    code = str(answer.status_code)
    if answer.status_code != 200 and answer.headers.get("content-type") == "application/json":
        code = f"{code} {answer.json()['error']['code']}"
    return Reply(begin_s, time.monotonic(), code), float(answer.headers.get("retry-after", 0))
