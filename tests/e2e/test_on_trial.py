"""A version on trial in one painter, without Serve: what it answers, and what it paints unseen."""

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aai.painter import Painter
from aai.proof import read_made
from aai.sampling import PaintRequest
from pipelines.service import painters
from pipelines.service.canary import Trial
from tests.e2e.test_rollover import another
from tests.pipelines.service.test_painters import LOOP, REQUEST, TONE, job, replica
from tests.pipelines.test_serve import write_tiny_bundle


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_bundle(tmp_path_factory.mktemp("tried")))


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
