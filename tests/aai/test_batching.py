"""Requests that are painted together give the pictures that each gives alone, come and go, and fail for themselves."""

import functools
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from aai.adapt import AdapterConfig, AudioAdapter
from aai.batching import StoppedError, Together, view_of
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.painter import Painter
from aai.sampling import PaintRequest
from tests.aai.test_painter import pixels, sound
from tests.aai.twice import Twice, a_call, in_one_round
from tests.tiny import write_published

GIVEN = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))


class Wanted(NamedTuple):
    """A request."""

    verb: str
    request: PaintRequest
    mask: Image.Image | None = None

    def paint(self, painter: Painter) -> np.ndarray:
        heard = sound(self.request.seed)
        if self.verb == "generate":
            return pixels(painter.generate(heard, self.request))
        return pixels(getattr(painter, self.verb)(heard, GIVEN, self.request, self.mask))


MIXED = [
    Wanted("generate", PaintRequest(steps=9, seed=1)),
    Wanted("generate", PaintRequest(steps=6, seed=2, guidance_scale=1)),
    Wanted("generate", PaintRequest(steps=12, seed=3, num_images=2, guidance_scale=7, negative_prompt="a bell")),
    Wanted("edit", PaintRequest(steps=10, seed=4)),
    Wanted("stylize", PaintRequest(steps=8, seed=5, denoise_strength=0.5)),
    Wanted("edit", PaintRequest(steps=8, seed=6, repaint="invert")),
    Wanted("stylize", PaintRequest(steps=6, seed=7, repaint="invert", num_images=2), MASK),
    Wanted("generate", PaintRequest(steps=9, seed=8, reuse_steps=3)),
]


class Counted:
    """The rows of each call that the UNet itself gets."""

    def __init__(self, painter: Painter) -> None:
        self.unet, self.rows = painter.pipe.unet, []  # type: ignore[var-annotated]
        plain = self.unet.forward

        @functools.wraps(plain)
        def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows.append(len(sample))
            self.before(sample)
            return plain(sample, *args, **kwargs)

        self.unet.forward = forward
        self.before: Callable[[torch.Tensor], None] = lambda sample: None
        self.together = Together(self.unet)

    def start(self, painter: Painter, wanted: Sequence[Wanted], pool: ThreadPoolExecutor) -> list[Future[np.ndarray]]:
        """All in one round: the first turn is another's until all have come."""
        turn, gate = threading.Event(), threading.Event()
        pool.submit(self.together.run, lambda: (turn.set(), gate.wait()), threading.Event())
        turn.wait()
        begun = [pool.submit(self.run, painter, one, threading.Event()) for one in wanted]
        self.wait_for(len(wanted))
        gate.set()
        return begun

    def wait_for(self, count: int) -> None:
        """Until so many wait for their first turn."""
        while self.together._came.qsize() < count:
            time.sleep(0.001)

    def run(self, painter: Painter, wanted: Wanted, stop: threading.Event, seen: Any = None) -> np.ndarray:
        alone = wanted.request.reuse_steps > 1
        return self.together.run(lambda: wanted.paint(view_of(painter)), stop, seen, alone)


@pytest.fixture
def counted(painter: Painter) -> Iterator[Counted]:
    """What is done to the UNet is undone."""
    _ = painter.concepts
    made = Counted(painter)
    yield made
    made.together.close()
    del made.unet.forward


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_all_verbs_together_are_what_each_is_alone(painter: Painter, counted: Counted) -> None:
    alone = [one.paint(painter) for one in MIXED]
    counted.rows.clear()
    with ThreadPoolExecutor(len(MIXED) + 1) as pool:
        together = [done.result(60) for done in counted.start(painter, MIXED, pool)]
    assert max(differ(a, b) for a, b in zip(alone, together, strict=True)) <= 1
    assert np.array_equal(alone[-1], together[-1])  # painted alone after all
    assert max(counted.rows) == 2 + 1 + 4 + 2 + 2 + 2 + 2  # every request's rows, the last one's apart
    calls = 9 + 6 + 12 + 8 + 4 + (6 + 7 + 7) + (5 + 5) + 9
    assert len(counted.rows) <= 9 + 20, f"{len(counted.rows)} calls instead of {calls}"  # its own, and the longest


@pytest.mark.parametrize("kind", ["1.5", "2.1", "xl"])
def test_published_shapes_are_painted_together(kind: str, spec: FoundationSpec, tmp_path: Path) -> None:
    found = FoundationSpec(clip=spec.clip, diffusion=str(write_published(tmp_path / kind, spec.clip, kind)))
    torch.manual_seed(0)
    small = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32)
    shape = AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=80 if kind == "xl" else 32)
    painter = Painter(load_diffusion(found), AudioEncoder(small).eval(), AudioAdapter(shape, 1.0).eval(), found)
    wanted = [Wanted("generate", PaintRequest(steps=3 + i, seed=i, guidance_scale=3 + i)) for i in range(3)]
    alone = [one.paint(painter) for one in wanted]
    counted = Counted(painter)
    with ThreadPoolExecutor(4) as pool:
        together = [done.result(60) for done in counted.start(painter, wanted, pool)]
    assert max(counted.rows) == 6
    assert max(differ(a, b) for a, b in zip(alone, together, strict=True)) <= 1
    assert differ(alone[0], alone[1]) > 10  # the test can fail


def test_one_that_comes_later_joins_at_the_next_step_and_may_leave_first(painter: Painter, counted: Counted) -> None:
    long, short = Wanted("generate", PaintRequest(steps=40, seed=1)), Wanted("generate", PaintRequest(steps=3, seed=2))
    came, late = threading.Event(), []

    def seen(*_: Any) -> None:
        if len(counted.rows) == 5:
            late.append(pool.submit(counted.run, painter, short, threading.Event()))
            counted.wait_for(1)
            came.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(counted.run, painter, long, threading.Event(), seen)
        came.wait(30)
        assert differ(first.result(60), long.paint(painter)) <= 1
        assert differ(late[0].result(60), short.paint(painter)) <= 1
    assert counted.rows[:40] == [2] * 6 + [4] * 3 + [2] * 31  # the round that was on goes to its end


def test_one_that_nobody_waits_for_leaves_at_its_next_step(painter: Painter, counted: Counted) -> None:
    gone, stays = Wanted("generate", PaintRequest(steps=30, seed=1)), Wanted("edit", PaintRequest(steps=30, seed=2))
    stop = threading.Event()

    def seen(*_: Any) -> None:
        if len(counted.rows) >= 4:
            stop.set()

    with ThreadPoolExecutor(2) as pool:
        left = pool.submit(counted.run, painter, gone, stop, seen)
        kept = pool.submit(counted.run, painter, stays, threading.Event())
    with pytest.raises(StoppedError):
        left.result(60)
    found, calls = kept.result(60), len(counted.rows)
    assert calls <= 24 + 4 + 1  # those of the one that stays, and what the other had before or asked for last
    assert differ(found, stays.paint(painter)) <= 1


def test_a_request_that_fails_fails_alone(painter: Painter, counted: Counted) -> None:
    wrong = Wanted("generate", PaintRequest(steps=4, prompt="a photo of <elsewhere>"))
    with ThreadPoolExecutor(3) as pool:
        bad, good = counted.start(painter, [wrong, MIXED[0]], pool)
        with pytest.raises(Exception, match="elsewhere"):
            bad.result(60)
        assert differ(good.result(60), MIXED[0].paint(painter)) <= 1


def test_a_failure_of_the_unet_reaches_all_whose_call_it_was(painter: Painter, counted: Counted) -> None:
    def broken(sample: torch.Tensor) -> None:
        if len(counted.rows) == 3:
            raise ValueError("broken")

    counted.before = broken
    with ThreadPoolExecutor(3) as pool:
        for done in counted.start(painter, [MIXED[0], MIXED[3]], pool):
            with pytest.raises(ValueError, match="broken"):
                done.result(60)
    counted.before = lambda sample: None
    assert MIXED[0].paint(painter).any()  # and the next one is painted


@pytest.mark.parametrize("most", [4, 2])
def test_what_memory_does_not_hold_is_halved(most: int, painter: Painter, counted: Counted) -> None:
    def small(sample: torch.Tensor) -> None:
        if len(sample) > most:
            counted.rows.pop()
            raise torch.OutOfMemoryError("no memory")

    wanted = [Wanted("generate", PaintRequest(steps=4, seed=i, num_images=1 + (i == 2))) for i in range(4)]
    alone = [one.paint(painter) for one in wanted]
    counted.rows.clear()
    counted.before = small
    with ThreadPoolExecutor(5) as pool:
        together = [done.result(60) for done in counted.start(painter, wanted, pool)]
    assert max(differ(a, b) for a, b in zip(alone, together, strict=True)) <= 1
    assert max(counted.rows) == most


@pytest.mark.parametrize("kind", ["fails", "alone"])
def test_a_flood_of_others_does_not_keep_a_request_from_its_end(kind: str, painter: Painter, counted: Counted) -> None:
    """They come again and again, and there is always one that has not had its first turn."""
    fails = Wanted("generate", PaintRequest(steps=1, prompt="a photo of <elsewhere>"))
    flood, over = (
        fails if kind == "fails" else Wanted("generate", PaintRequest(steps=2, reuse_steps=2)),
        threading.Event(),
    )

    alone = MIXED[0].paint(painter)

    def again() -> int:
        count = 0
        while not over.is_set():
            with suppress(UserError):
                counted.run(painter, flood, threading.Event())
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(again) for _ in range(4)]
        try:
            found = pool.submit(counted.run, painter, MIXED[0], threading.Event()).result(60)
        finally:
            over.set()
        assert differ(found, alone) <= 1
        assert sum(done.result(60) for done in others) > 4


def test_what_memory_did_not_hold_is_freed_before_the_halves(painter: Painter, counted: Counted) -> None:
    class Large:
        """Stands for what the UNet has in memory when it fails."""

    held: list[weakref.ref[Large]] = []
    alive: list[int] = []

    def small(sample: torch.Tensor) -> None:
        alive.append(sum(ref() is not None for ref in held))
        large = Large()
        held.append(weakref.ref(large))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("no memory")

    counted.before = small
    wanted = [Wanted("generate", PaintRequest(steps=1, seed=i, num_images=1 + i)) for i in range(2)]
    gc.disable()
    try:
        with ThreadPoolExecutor(3) as pool:
            for done in counted.start(painter, wanted, pool):
                done.result(60)
    finally:
        gc.enable()
    assert len(alive) >= 4  # both together, each alone, the second one's halves
    assert set(alive) == {0}


def test_many_that_come_and_go_at_random_all_end(painter: Painter, counted: Counted) -> None:
    chance = random.Random(5)
    alone = {one.request.seed: one.paint(painter) for one in MIXED}

    def one(wanted: Wanted, leaves: bool, delay_s: float) -> int | None:
        time.sleep(delay_s)
        stop = threading.Event()
        if leaves:
            threading.Timer(chance.random() / 20, stop.set).start()
        try:
            return differ(counted.run(painter, wanted, stop), alone[wanted.request.seed])
        except StoppedError:
            return None

    with ThreadPoolExecutor(9) as pool:
        begun = [pool.submit(one, chance.choice(MIXED), chance.random() < 0.4, chance.random() / 5) for _ in range(60)]
        found = [done.result(120) for done in begun]
    assert {difference for difference in found if difference is not None} <= {0, 1}
    assert found.count(None) < 60


# ---------------------------------------------------------------- calls alone, of a network of one product


def test_calls_that_fit_are_one_and_each_gets_its_own_rows() -> None:
    unet, told = Twice(), list[int]()
    added = [{"text_embeds": torch.full((rows, 2), float(rows))} for rows in (2, 1, 3)]
    calls = [a_call(i, len(a["text_embeds"]), added_cond_kwargs=a) for i, a in enumerate(added, 3)]
    calls[1]["timestep"] = torch.tensor(4)
    alone = [unet(**arguments)[0] for arguments in calls]
    unet.rows.clear()
    for found, wanted in zip(in_one_round(unet, calls, told.append), alone, strict=True):
        assert torch.equal(found, wanted)
        assert not found.requires_grad
    assert unet.rows == told == [6]
    assert unet.forward.__func__ is Twice.forward, "left as it was"  # type: ignore[attr-defined]


def test_calls_that_do_not_fit_are_made_apart() -> None:
    for changes in (
        {"sample": torch.ones(2, 1, 2, 2, dtype=torch.float64)},
        {"sample": torch.ones(2, 1, 4, 4)},
        {"own": "of one request"},
        {"added_cond_kwargs": {"text_embeds": torch.ones(2, 2)}},
    ):
        unet, calls = Twice(), [a_call(1), a_call(2, **changes), a_call(3)]
        alone = [unet(**arguments)[0] for arguments in calls]
        unet.rows.clear()
        assert all(torch.equal(a, b) for a, b in zip(in_one_round(unet, calls), alone, strict=True))
        assert sorted(unet.rows) == [2, 4], changes


@pytest.mark.parametrize("count", [2, 3, 5])
def test_halves_lose_none_and_a_call_too_large_alone_fails_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []

    def empty() -> None:
        emptied.append(True)
        raise torch.AcceleratorError("the device failed")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    unet, calls = Twice(), [a_call(i) for i in range(count - 1)]
    alone = [unet(**arguments)[0] for arguments in calls]
    unet.most = 2
    *found, large = in_one_round(unet, [*calls, a_call(9, rows=3)])
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert isinstance(large, torch.OutOfMemoryError)
    assert emptied


def test_a_thread_whose_request_has_ended_calls_as_before_and_one_that_is_stopped_gets_nothing() -> None:
    unet = Twice()
    together, stop = Together(unet), threading.Event()

    def stopped() -> Any:
        calls = iter((stop.set, lambda: None))
        plain, unet.most = together._forward, 99

        def forward(**arguments: Any) -> Any:
            next(calls)()  # while its call is made
            return plain(**arguments)

        together._forward = forward
        try:
            return unet.forward(**a_call(1))
        finally:
            together._forward = plain

    def work() -> Any:
        with pytest.raises(StoppedError):
            together.run(stopped, stop)
        together.run(lambda: None, threading.Event())
        return unet.forward(**a_call(1))[0]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(30).shape == (2, 1, 2, 2)
    together.close()


def test_a_request_that_is_alone_changes_no_threads() -> None:
    """Each change costs milliseconds on a busy machine; a test of above shows that others still join it."""
    threads: list[int] = []

    class Unet:
        def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
            threads.append(threading.get_ident())
            return (sample,)

    unet = Unet()
    together = Together(unet)

    def work() -> int:
        for _ in range(3):
            unet.forward(torch.zeros(1))
        return threading.get_ident()

    mine = together.run(work, threading.Event())
    together.close()
    assert threads == [mine] * 3
