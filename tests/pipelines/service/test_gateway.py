"""The gateway in front of painters that Serve runs in this process, in its mode for tests."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve

from aai.errors import UserError
from aai.sampling import PaintRequest
from pipelines.service import gateway as module
from pipelines.service.answers import PaintProgress, ServedModel
from pipelines.service.gateway import Gateway
from pipelines.service.guard import ApiError
from pipelines.service.http import PaintJob, Verb
from pipelines.service.keys import KEY_VARIABLE

MODEL = {"name": "toy", "version": "1", "sha": "s", "sample_rate_hz": 16_000}
TONE = {"sound": np.zeros(8, np.float32)}


@serve.deployment
class Echo:
    """Tells what it was asked, after a while; refuses one prompt."""

    async def paint(self, job: PaintJob) -> tuple[list[bytes], dict[str, Any]]:
        await asyncio.sleep(0.05)
        if job.request.prompt == "wrong":
            raise UserError("prompt", "wrong", "is wrong", "mend it")
        size, told = job.image and job.image.size, job.given or ""
        model = MODEL if job.request.seed != 99 else {**MODEL, "version": "2", "alias": "candidate"}
        return [f"{job.verb} {job.sounds['sound'].shape} {size} {job.request.seed}{told}".encode()], model

    async def paint_live(self, job: PaintJob) -> AsyncIterator[dict[str, Any]]:
        for step in (1, 2):
            yield {"step": step, "steps": 2, "preview": None}
        files, model = await self.paint(job)
        yield {"files": files, "model": model}


@pytest.fixture(scope="module")
def painters() -> Any:
    return serve.run(Echo.bind(), name="gateway", _local_testing_mode=True)


def gateway(painters: Any, capacity: int = 2, need_key: bool = False, **limits: int) -> Gateway:
    return Gateway(painters, MODEL, {"retry_after_s": 7, **limits}, capacity, 1, need_key)


def wanted(verb: Verb = "generate", image: Image.Image | None = None, **settings: Any) -> PaintJob:
    given = {"sounds": {"sound": "ab"}} if settings.pop("told", False) else {}
    return PaintJob(verb, TONE, PaintRequest(**settings), image, given=given)


def test_requests_reach_the_painters_with_their_picture_as_pixels(painters: Any) -> None:
    here = gateway(painters)
    picture = Image.new("RGB", (6, 4))
    painted = asyncio.run(here.paint(wanted("edit", picture, seed=3)))
    assert painted == ([b"edit (8,) (6, 4) 3"], ServedModel.parse(MODEL))
    assert asyncio.run(here.paint(wanted())).files == [b"generate (8,) None 0"]
    told = here.paint(wanted(told=True))
    assert asyncio.run(told).files == [b"generate (8,) None 0{'sounds': {'sound': 'ab'}}"]


def test_an_answer_of_a_version_on_trial_does_not_change_what_is_served(painters: Any) -> None:
    here = gateway(painters)
    assert asyncio.run(here.paint(wanted(seed=99))).model.label() == "toy/2@candidate"
    assert here.model.label() == "toy/1"


def test_what_is_more_than_the_capacity_is_told_to_come_again(painters: Any) -> None:
    here = gateway(painters, capacity=2)

    async def ask() -> list[Any]:
        asked = [here.paint(wanted(seed=i)) for i in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert (first.files, second.files) == ([b"generate (8,) None 0"], [b"generate (8,) None 1"])
    assert isinstance(third, ApiError)
    assert (third.status_code, third.code, third.headers) == (429, "queue_full", {"Retry-After": "7"})
    assert len(asyncio.run(ask())) == 3  # the places are free again
    assert not here._in_flight


def test_steps_of_waiting_pictures_are_bounded_but_one_request_always_fits(painters: Any) -> None:
    here = gateway(painters, capacity=9, max_queued_steps=100)

    async def ask(*steps: int) -> list[Any]:
        asked = [here.paint(wanted(steps=count, num_images=2)) for count in steps]
        return [getattr(told, "code", "painted") for told in await asyncio.gather(*asked, return_exceptions=True)]

    assert asyncio.run(ask(20, 30, 1)) == ["painted", "painted", "queue_full"]
    assert asyncio.run(ask(100, 1)) == ["painted", "queue_full"]
    assert here._steps() == 0


def test_an_inversion_counts_with_all_its_calls_of_the_unet(painters: Any) -> None:
    """Up, down, and for a mask that nobody gave: else the bound and what operators see is too low by half."""
    here, white = gateway(painters, capacity=9), Image.new("RGB", (6, 4))

    async def counted(job: PaintJob) -> int:
        asked = asyncio.create_task(here.paint(job))
        await asyncio.sleep(0)
        steps = here._steps()
        await asked
        return steps

    drawn = wanted("edit", white, steps=10, num_images=2)
    turned = wanted("edit", white, steps=10, num_images=2, repaint="invert")
    masked = PaintJob("edit", TONE, turned.request, white, white)
    assert [asyncio.run(counted(job)) for job in (drawn, turned, masked)] == [2 * 8, 2 * (6 + 18), 2 * 18]


def test_what_happens_is_told_live(painters: Any) -> None:
    here = gateway(painters, capacity=1)

    async def ask() -> list[Any]:
        told = [event async for event in here.paint_live(wanted(seed=4))]
        assert not here._in_flight
        return told

    *stages, answer = asyncio.run(ask())
    assert stages == [PaintProgress(0), PaintProgress(1, 2), PaintProgress(2, 2)]
    assert answer == ([b"generate (8,) None 4"], ServedModel.parse(MODEL))

    async def leave() -> None:
        events = here.paint_live(wanted())
        await anext(events)
        assert here.full()
        with pytest.raises(ApiError, match="queue is full"):
            await anext(here.paint_live(wanted()))
        await events.aclose()
        assert not here.full()
        with pytest.raises(UserError, match="mend it"):
            async for _ in here.paint_live(wanted(prompt="wrong")):
                pass
        assert not here.full()

    asyncio.run(leave())


def test_a_users_mistake_comes_back_as_it_is_and_frees_its_place(painters: Any) -> None:
    here = gateway(painters, capacity=1)
    for _ in range(2):
        with pytest.raises(UserError, match="prompt=wrong: is wrong; mend it"):
            asyncio.run(here.paint(wanted(prompt="wrong")))


def test_without_the_key_that_is_asked_for_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match=rf"^{KEY_VARIABLE}=\(missing\): the service needs an API key"):
        gateway(None, need_key=True)
    assert gateway(None).model.label() == "toy/1"
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert not gateway(None, need_key=True)._in_flight


def test_while_the_controller_is_away_health_tells_the_last_figures_and_takes_no_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, back, asked = gateway(None), threading.Event(), []

    def away() -> tuple[int, int]:
        asked.append(1)
        assert back.wait(60)
        raise ConnectionError("the head is away")

    monkeypatch.setattr(module, "ASK_S", 0.05)

    async def ask() -> list[int]:
        monkeypatch.setattr(module, "_painters", lambda: (3, 4))
        assert (await here.health()).replicas == 3
        here._asked_s = -1.0
        monkeypatch.setattr(module, "_painters", away)
        told = await asyncio.gather(*(here.health() for _ in range(50)))  # more than there are threads
        assert await asyncio.to_thread(lambda: "free")  # uploads are decoded in these
        back.set()
        assert here._asking is not None
        await here._asking
        return [health.replicas for health in [*told, await here.health()]]

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == [3] * 51
    assert asked == [1]


def test_it_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom pipelines.service.gateway import Gateway\n"
        "model = {'name': 'toy', 'version': '1', 'sha': 's', 'sample_rate_hz': 16000}\n"
        "Gateway(None, model, {}, 1, 1, False).__serve_build_asgi_app__()\n"
        "heavy = {'torch', 'torchaudio', 'transformers', 'diffusers', 'mlflow', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
