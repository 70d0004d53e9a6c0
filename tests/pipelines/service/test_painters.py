"""One painter of the service, without Serve: what it paints, and when it calls itself ill."""

import asyncio
import io
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aai.bundle import read_bundle
from aai.errors import UserError
from aai.painter import Painter
from aai.proof import read_made, read_proof
from aai.sampling import PaintRequest
from pipelines.service import painters
from pipelines.service.canary import Trial
from pipelines.service.http import PaintJob, Verb
from pipelines.service.painters import PainterReplica
from tests.aai.test_addons import write_checker
from tests.certificates import certified
from tests.e2e.test_rollover import another

LOOP = asyncio.Runner()
"""A painter lives in one event loop, as in a replica of Serve."""
TONE = {"sound": (np.sin(np.arange(8000) / 5) / 2).astype(np.float32)}
REQUEST = PaintRequest(steps=2, denoise_strength=1)
RED = np.full((64, 64, 3), (255, 0, 0), np.uint8)


GIVEN = {"sounds": {"sound": "0" * 64}, "image_sha256": "1" * 64}


def replica(bundle: str, **changes: Any) -> PainterReplica:
    model = {
        "name": "tiny",
        "version": "3",
        "alias": "champion",
        "sha": read_bundle(bundle).sha,
        "sample_rate_hz": 16_000,
    }
    given = {"bundle": bundle, "model": model, "registry": {}, "device": "cpu", "dtype": "float32", "stuck_s": 60}
    return PainterReplica({**given, "addons": {}, "proof": {}, "trust": {}, **changes})


def job(verb: Verb, pixels: Sequence[Any] = (None, None), request: PaintRequest = REQUEST) -> PaintJob:
    image, mask = (None if each is None else Image.fromarray(each) for each in pixels)
    return PaintJob(verb, TONE, request, image, mask, GIVEN)


def paint(painter: PainterReplica, verb: Verb, pixels: list[Any], request: PaintRequest = REQUEST) -> list[bytes]:
    files, model = LOOP.run(painter.paint(job(verb, pixels, request)))
    assert model["name"] == "tiny"
    return files


@pytest.fixture(scope="module")
def painter(tiny_bundle: str) -> PainterReplica:
    return replica(tiny_bundle)


def test_each_verb_paints_its_own_picture(painter: PainterReplica) -> None:
    made = {}
    for verb, pixels in (("generate", [None, None]), ("edit", [RED, None]), ("stylize", [RED, None])):
        pictures = paint(painter, verb, pixels)  # type: ignore[arg-type]
        assert [Image.open(io.BytesIO(data)).size for data in pictures] == [(64, 64)]
        made[verb] = pictures[0]
    assert len(set(made.values())) == 3
    assert paint(painter, "edit", [RED, None]) == [made["edit"]]
    inverted = REQUEST.model_copy(update={"repaint": "invert"})
    kept = paint(painter, "edit", [RED, np.zeros_like(RED)], inverted)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept[0]))), RED)


def test_pictures_tell_how_they_were_made_and_prove_it(tiny_bundle: str, tmp_path: Path) -> None:
    certified(tmp_path, "painter", certified(tmp_path, "root"))
    proof = {"certificate": f"{tmp_path}/painter.chain", "private_key": f"{tmp_path}/painter.pem"}
    proving, request = replica(tiny_bundle, proof=proof), REQUEST.model_copy(update={"seed": 5, "num_images": 2})
    for i, png in enumerate(paint(proving, "edit", [RED, None], request)):
        proof_of = read_proof(png, f"{tmp_path}/root.crt")
        assert proof_of.state == "trusted"
        wanted = {"verb": "edit", "model": "tiny/3", "bundle": read_bundle(tiny_bundle).sha, "seed": 5 + i}
        assert {**proof_of.made, **wanted, **GIVEN} == proof_of.made


def test_a_picture_that_the_safety_checker_stops_is_left_out(tiny_bundle: str, tmp_path: Path) -> None:
    write_checker(tmp_path, tmp_path)
    checked = replica(tiny_bundle, addons={"safety_checker": str(tmp_path)})
    assert paint(checked, "generate", [None, None]) == [b""]
    inverted = REQUEST.model_copy(update={"repaint": "invert", "num_images": 2})
    assert paint(checked, "edit", [RED, None], inverted) == [b"", b""]


@pytest.mark.parametrize("changes", [{}, {"verb": "edit"}, {"verb": "edit", "repaint": "invert"}])
def test_a_picture_that_nobody_waits_for_ends_at_the_next_step(
    changes: dict[str, Any], painter: PainterReplica
) -> None:
    verb, repaint = changes.get("verb", "generate"), changes.get("repaint", "img2img")
    pixels = [None, None] if verb == "generate" else [RED, None]
    long = PaintRequest(steps=100, num_images=8, denoise_strength=1, repaint=repaint)
    calls: list[float] = []
    hook = painter._serving.painter.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(time.monotonic()))

    async def leave() -> tuple[int, list[bytes]]:
        task = asyncio.create_task(painter.paint(job(verb, pixels, long)))
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = len(calls)
        files, _ = await painter.paint(job("generate"))
        return before, files

    try:
        before, files = LOOP.run(asyncio.wait_for(leave(), 120))
    finally:
        hook.remove()
    assert len(calls) - before <= 2 + 1 + REQUEST.steps  # at most one step more, and those of the next picture
    assert files == paint(painter, "generate", [None, None])  # which is what it would have been


def test_requests_are_painted_together_and_heavy_ones_get_their_turn(painter: PainterReplica) -> None:
    """Eight pictures at most: two requests of four fill it, and one of eight is not overtaken by small ones."""
    sizes, order = [], []
    told = painter._together._told
    painter._together._told = sizes.append

    async def one(seed: int, count: int) -> tuple[int, list[bytes]]:
        request = REQUEST.model_copy(update={"seed": seed, "num_images": count, "steps": 6})
        files, _ = await painter.paint(job("generate", request=request))
        order.append(seed)
        return seed, files

    async def crowd() -> dict[int, list[bytes]]:
        return dict(await asyncio.gather(one(10, 4), one(20, 4), one(30, 8), one(40, 1), one(50, 1)))

    try:
        made = LOOP.run(crowd())
    finally:
        painter._together._told = told
    assert max(sizes) == 16  # with guidance two rows for each picture
    assert order.index(30) == 2
    assert [len(made[seed]) for seed in (10, 20, 30, 40, 50)] == [4, 4, 8, 1, 1]
    assert all(Image.open(io.BytesIO(file)).size == (64, 64) for files in made.values() for file in files)


def test_a_request_tells_how_far_it_is(painter: PainterReplica) -> None:
    async def live() -> list[dict[str, Any]]:
        request = REQUEST.model_copy(update={"steps": 10})
        return [event async for event in painter.paint_live(job("edit", [RED, None], request))]

    *told, last = LOOP.run(live())
    assert [(event["step"], event["steps"]) for event in told] == [(i + 1, 10) for i in range(10)]
    previews = [event["preview"] for event in told if event["preview"]]
    assert all(Image.open(io.BytesIO(preview)).size == (64, 64) for preview in previews)
    assert len(previews) >= 4
    assert last["files"] == paint(painter, "edit", [RED, None], REQUEST.model_copy(update={"steps": 10}))
    assert last["model"]["version"] == "3"

    async def wrong() -> None:
        request = REQUEST.model_copy(update={"prompt": "<elsewhere>"})
        async for _ in painter.paint_live(job("generate", request=request)):
            pass

    with pytest.raises(UserError, match="elsewhere"):
        LOOP.run(wrong())


class OnTrial:
    """A painter with a version on trial, and what its metrics are told."""

    def __init__(self, bundle: str, folder: Path, **canary: float) -> None:
        self.folder = another(Path(bundle), folder)
        self.painter = replica(bundle, canary=canary, batch_pictures=2, board="board")
        model = self.painter._serving.model.model_copy(update={"version": "4", "alias": "candidate"})
        self.painter.take_canary(str(self.folder), model)
        self.painter.trial.may_answer = True
        self.told: list[tuple[Any, ...]] = []
        self.apart: list[float] = []
        self.painter._metrics.version = lambda *told: self.told.append(told[:4])  # type: ignore[method-assign]
        self.painter._metrics.apart = lambda _, apart: self.apart.append(apart)  # type: ignore[method-assign]

    async def paint(self, request: PaintRequest = REQUEST) -> tuple[bytes, str]:
        (file,), model = await self.painter.paint(job("generate", request=request))
        return file, model["version"]

    async def and_unseen(self, *requests: PaintRequest) -> list[tuple[bytes, str]]:
        """Paints, and waits for what is painted besides."""
        painted = [await self.paint(request) for request in requests]
        await asyncio.gather(*self.painter._unseen)
        return painted


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), int)


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "start", lambda *_: None)  # there is no registry here
    monkeypatch.setattr(painters, "BoardClient", lambda _: SimpleNamespace(tell=lambda _: None, moved=None))
    monkeypatch.setattr(painters, "board_name", str)


@pytest.mark.usefixtures("no_trial")
def test_a_version_on_trial_answers_its_share(
    tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = OnTrial(tiny_bundle, tmp_path / "other", share=1)
    png, version = LOOP.run(tried.paint())
    ours = Painter.load(tried.folder).generate(TONE, REQUEST)[0]
    assert version == "4"
    assert np.array_equal(pixels_of(png), np.asarray(ours))
    assert read_made(png)["model"] == "tiny/4"
    tried.painter.trial.may_answer = False
    served, version = LOOP.run(tried.paint())
    assert version == "3"
    tried.painter.trial.may_answer = True
    with monkeypatch.context() as patch:
        patch.setattr(tried.painter._canary.painter, "generate", lambda *_: 1 / 0)  # type: ignore[union-attr]
        png, version = LOOP.run(tried.paint())
    assert (version, np.array_equal(pixels_of(png), pixels_of(served))) == ("3", True)
    assert tried.told == [
        ("canary", "4", "ok", 1),
        ("served", "3", "ok", 1),
        ("canary", "4", "failed", 1),
        ("served", "3", "ok", 1),
    ]
    tried.painter.end_canary()
    assert LOOP.run(tried.paint())[1] == "3"
    assert tried.painter.check_health() is None


@pytest.mark.usefixtures("no_trial")
def test_what_is_painted_unseen_is_compared_and_gives_way(tiny_bundle: str, tmp_path: Path) -> None:
    tried = OnTrial(tiny_bundle, tmp_path / "other", shadow=1)
    ((png, version),) = LOOP.run(tried.and_unseen(REQUEST))
    theirs = np.asarray(Painter.load(tried.folder).generate(TONE, REQUEST)[0], int)
    assert version == "3"
    assert tried.told == [("served", "3", "ok", 1), ("shadow", "4", "ok", 1)]
    assert tried.apart == pytest.approx([np.abs(pixels_of(png) - theirs).mean() / 255])
    tried.told.clear()
    long = REQUEST.model_copy(update={"steps": 100})
    alone = REQUEST.model_copy(update={"reuse_steps": 2, "steps": 4})  # takes all places

    async def others() -> None:
        await tried.paint(long)
        while not tried.painter._started_s:
            await asyncio.sleep(0.01)
        await tried.and_unseen(alone)

    LOOP.run(asyncio.wait_for(others(), 120))
    assert [told[:3] for told in tried.told] == [
        ("served", "3", "ok"),
        ("shadow", "4", "stopped"),
        ("served", "3", "ok"),
        ("shadow", "4", "skipped"),
    ]
    assert tried.painter._places._value == 2
    assert not tried.painter._unseen


def test_a_painter_is_ill_when_it_is_stuck_or_its_device_failed(
    painter: PainterReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter, "_started_s", {1: time.monotonic() - 59, 2: time.monotonic()})
    painter.check_health()
    monkeypatch.setattr(painter, "_started_s", {1: time.monotonic(), 2: time.monotonic() - 61})
    with pytest.raises(RuntimeError, match="painting for more than 60 s"):
        painter.check_health()


@pytest.mark.parametrize(("error", "ill"), [(torch.AcceleratorError, True), (UserError, False)])
def test_only_a_failed_device_makes_it_ill(
    error: type[Exception], ill: bool, painter: PainterReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("prompt", "x", "is wrong", "mend it") if error is UserError else error("CUDA error")

    with monkeypatch.context() as patch:
        patch.setattr(painter, "_broken", "")
        patch.setattr(painter._serving.painter, "generate", fail)
        with pytest.raises(error):
            painter._paint(job("generate"), threading.Event(), None)
        assert painter._started_s == {}
        assert bool(painter._broken) == ill
        if ill:
            with pytest.raises(RuntimeError, match="the device failed: CUDA error"):
                painter.check_health()
