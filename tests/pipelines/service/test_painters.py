"""One painter of the service, without Serve: what it paints, and when it calls itself ill."""

import asyncio
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aai.bundle import read_bundle
from aai.errors import UserError
from aai.progress import DenoisingProgress
from aai.proof import read_proof
from aai.sampling import PaintRequest
from pipelines.service import painters
from pipelines.service.http import PaintJob, Verb
from pipelines.service.painters import PainterReplica
from tests.aai.test_addons import write_checker
from tests.certificates import certified

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


def places(painter: PainterReplica) -> int:
    """How many are free."""
    return painter._places._value


@pytest.mark.parametrize(
    ("most", "changes", "taken"),
    [(8, {"num_images": 3}, 3), (8, {"reuse_steps": 2}, 8), (2, {"num_images": 4}, 2), (8, {"reuse_steps": 1}, 1)],
)
def test_a_request_takes_its_places_and_gives_all_back(
    most: int, changes: dict[str, int], taken: int, painter: PainterReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are it cannot take; what shares no layers with others takes all."""
    seen: list[int] = []
    monkeypatch.setattr(painter, "_config", painter._config.model_copy(update={"batch_pictures": most}))
    monkeypatch.setattr(painter, "_places", asyncio.Semaphore(most))
    monkeypatch.setattr(painter, "_paint", lambda *args: (seen.append(places(painter)), ([], painter._serving))[1])

    async def one() -> None:
        request = REQUEST.model_copy(update=changes)
        await asyncio.wait_for(painter.paint(job("generate", request=request)), 20)
        await asyncio.sleep(0)

    LOOP.run(one())
    assert (seen, places(painter)) == ([most - taken], most)


def test_who_leaves_while_it_waits_for_places_keeps_none(painter: PainterReplica) -> None:
    async def leave() -> None:
        most = places(painter)
        assert await painter._taken(most - 1) == most - 1
        waiting = asyncio.create_task(painter._taken(3))
        small = asyncio.create_task(painter._taken(1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert (places(painter), small.done()) == (0, False), "it has one and is not overtaken"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.wait_for(small, 20) == 1
        painter._free(most)
        assert places(painter) == most

    LOOP.run(leave())


def test_a_stream_that_is_closed_ends_the_painting(painter: PainterReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def endless(*args: Any) -> None:
        args[-1](DenoisingProgress(1, 9))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    monkeypatch.setattr(painter, "paint", endless)

    async def leave() -> None:
        events = painter.paint_live(job("generate"))
        assert (await anext(events))["step"] == 1
        await events.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    LOOP.run(leave())
    assert ended == [True]


@pytest.mark.parametrize("reuse_steps", [1, 2])
def test_what_keeps_layers_is_painted_alone_and_by_the_model_that_began(
    reuse_steps: int, painter: PainterReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, given = painter._serving, []
    other = replace(before, model=before.model.model_copy(update={"version": "4"}))

    def run(work: Any, stop: Any, seen: Any = None, alone: bool = False) -> list[Any]:
        given.append(alone)
        monkeypatch.setattr(painter, "_serving", other)  # another version is taken up meanwhile
        return []

    monkeypatch.setattr(painter._together, "run", run)
    request = REQUEST.model_copy(update={"reuse_steps": reuse_steps})
    _, serving = painter._paint(job("generate", request=request), threading.Event(), None)
    assert (given, serving.model.version) == ([reuse_steps > 1], "3")


def test_only_a_version_that_paints_is_taken_up(
    painter: PainterReplica, tiny_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = painter._serving
    monkeypatch.setattr(painter, "_serving", before)
    found = replace(before, model=before.model.model_copy(update={"version": "4"}))
    monkeypatch.setattr(painters, "loaded", lambda *args: found)
    with monkeypatch.context() as patch:
        patch.setattr(before.painter, "generate", lambda *args: [Image.new("RGB", (8, 8), "grey")])
        with pytest.raises(UserError, match="are of one colour"):
            painter.take("uri", found.model)
    assert (painter._serving.model.version, painter.watcher.served.version) == ("3", "3")
    painter.take("uri", found.model)
    assert (painter._serving.model.version, painter.watcher.served.version) == ("4", "4")
    painter.watcher.served = before.model
