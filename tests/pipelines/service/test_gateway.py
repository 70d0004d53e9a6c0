"""The gateway in front of painters that Serve runs in this process, in its mode for tests."""

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve

from aai.errors import UserError
from aai.sampling import PaintRequest
from pipelines.service.gateway import KEY_VARIABLE, Gateway
from pipelines.service.guard import ApiError
from pipelines.service.http import ServedModel

MODEL = {"name": "toy", "version": "1", "sha": "s", "sample_rate_hz": 16_000}
TONE = {"sound": np.zeros(8, np.float32)}


@serve.deployment
class Echo:
    """Tells what it was asked, after a while; refuses one prompt."""

    async def paint(
        self, verb: str, sounds: dict[str, np.ndarray], pixels: Any, request: PaintRequest, given: dict[str, Any]
    ) -> tuple[list[bytes], dict[str, Any]]:
        await asyncio.sleep(0.05)
        if request.prompt == "wrong":
            raise UserError("prompt", "wrong", "is wrong", "mend it")
        shape = None if pixels[0] is None else pixels[0].shape
        return [f"{verb} {sounds['sound'].shape} {shape} {request.seed}{given or ''}".encode()], MODEL


@pytest.fixture(scope="module")
def painters() -> Any:
    return serve.run(Echo.bind(), name="gateway", _local_testing_mode=True)


def gateway(painters: Any, capacity: int = 2, need_key: bool = False) -> Gateway:
    return Gateway(painters, MODEL, {"retry_after_s": 7}, capacity, need_key)


def test_requests_reach_the_painters_with_their_picture_as_pixels(painters: Any) -> None:
    here = gateway(painters)
    picture = Image.new("RGB", (6, 4))
    painted = asyncio.run(here.paint("edit", TONE, picture, PaintRequest(seed=3)))
    assert painted == ([b"edit (8,) (4, 6, 3) 3"], ServedModel.parse(MODEL))
    assert asyncio.run(here.paint("generate", TONE, None, PaintRequest())).files == [b"generate (8,) None 0"]
    told = here.paint("generate", TONE, None, PaintRequest(), given={"sounds": {"sound": "ab"}})
    assert asyncio.run(told).files == [b"generate (8,) None 0{'sounds': {'sound': 'ab'}}"]


def test_what_is_more_than_the_capacity_is_told_to_come_again(painters: Any) -> None:
    here = gateway(painters, capacity=2)

    async def ask() -> list[Any]:
        asked = [here.paint("generate", TONE, None, PaintRequest(seed=i)) for i in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert (first.files, second.files) == ([b"generate (8,) None 0"], [b"generate (8,) None 1"])
    assert isinstance(third, ApiError)
    assert (third.status_code, third.code, third.headers) == (429, "queue_full", {"Retry-After": "7"})
    assert len(asyncio.run(ask())) == 3  # the places are free again
    assert here._in_flight == 0


def test_a_users_mistake_comes_back_as_it_is_and_frees_its_place(painters: Any) -> None:
    here = gateway(painters, capacity=1)
    for _ in range(2):
        with pytest.raises(UserError, match="prompt=wrong: is wrong; mend it"):
            asyncio.run(here.paint("generate", TONE, None, PaintRequest(prompt="wrong")))


def test_without_the_key_that_is_asked_for_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match=rf"^{KEY_VARIABLE}=\(missing\): the service needs an API key"):
        gateway(None, need_key=True)
    assert gateway(None).model.label() == "toy/1"
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert gateway(None, need_key=True)._in_flight == 0


def test_it_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom pipelines.service.gateway import Gateway\n"
        "model = {'name': 'toy', 'version': '1', 'sha': 's', 'sample_rate_hz': 16000}\n"
        "Gateway(None, model, {}, 1, False).__serve_build_asgi_app__()\n"
        "heavy = {'torch', 'torchaudio', 'transformers', 'diffusers', 'mlflow', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
