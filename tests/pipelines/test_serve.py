"""The service as a user starts it: `aai serve` on a tiny registered bundle, asked over real HTTP."""

import asyncio
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from aai.adapt import AdapterConfig, AudioAdapter
from aai.bundle import BundleConfig, write_bundle
from aai.concepts import Vocabulary
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.sampling import PaintRequest
from pipelines.__main__ import main
from pipelines.registry import versions
from pipelines.serve import ServeConfig, application, build_app, check_address
from pipelines.service.http import ServedModel
from pipelines.settings import TrackingConfig
from tests.conftest import SHARING
from tests.hostile import png, wav
from tests.hostile_heads import oddities
from tests.hostile_requests import attack, fields, forms, wrong
from tests.tiny import SIZES, write_clip, write_diffusion

KEY = "a-key-for-tests"
HEADERS = {"X-API-Key": KEY}
WEBHOOK_SECRET = "a-secret-for-tests"
SLOW = {"steps": "100", "num_images": "8"}
QUICK = {"steps": "1"}


def write_tiny_bundle(folder: Path) -> Path:
    """A bundle of random weights on random foundation models."""
    clip = write_clip(folder / "clip")
    foundation = FoundationSpec(clip=str(clip), diffusion=str(write_diffusion(folder / "diffusion", clip)))
    dim = SIZES.hidden_size
    encoder = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, embed_dim=dim, clip_s=1)
    adapter = AdapterConfig(hidden_size=32, embed_dim=dim, token_dim=dim)
    vocabulary = Vocabulary(objects=("dog", "bell"), ambiences=("in the rain", "at night"))
    torch.manual_seed(3)
    config = BundleConfig(
        foundation=foundation,
        encoder=encoder.model_dump(),
        adapter=adapter.model_dump(),
        vocabulary=vocabulary.model_dump(mode="json"),
    )
    weights = AudioEncoder(encoder).state_dict(), AudioAdapter(adapter).state_dict()
    write_bundle(folder / "bundle", config, *weights, {"data_fingerprint": "d", "metrics": {}, "parents": []})
    return folder / "bundle"


@dataclass(frozen=True)
class Service:
    """A running `aai serve`."""

    url: str
    bundle: Path
    ready_line: str
    metrics_port: int
    process: subprocess.Popen[str]

    def post(self, verb: str, data: dict[str, str], image: bytes | None = None) -> httpx.Response:
        """One request with a short tone."""
        files = {"audio": wav()} | ({"image": image} if image else {})
        return httpx.post(f"{self.url}/v1/{verb}", files=files, data=data, headers=HEADERS, timeout=120)

    def health(self) -> dict[str, object]:
        """What /healthz says; it must not wait for a picture."""
        return dict(httpx.get(f"{self.url}/healthz", timeout=20).json())

    def wait_until(self, **figures: int) -> None:
        """Waits until /healthz shows these figures."""
        end_s = time.monotonic() + 60
        while any(self.health()[name] != value for name, value in figures.items()):
            assert time.monotonic() < end_s, f"{figures} was not reached: {self.health()}"
            time.sleep(0.05)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, key: str = KEY, **settings: Any) -> Iterator[Service]:
    """`aai serve` on a tiny bundle that is registered in a new registry."""
    bundle = write_tiny_bundle(folder)
    registry = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model_name="tiny")
    versions.set_alias(registry, "champion", versions.register(registry, bundle, {}, {}))
    with running(folder, bundle, registry, key, **settings) as started:
        yield started


@contextmanager
def running(folder: Path, bundle: Path, registry: TrackingConfig, key: str = KEY, **settings: Any) -> Iterator[Service]:
    """`aai serve` of the champion in a registry; it must end cleanly."""
    (folder / "token").write_text("0123456789abcdef" * 4)
    ports = {"port": free_port(), "metrics_port": free_port()}
    config = ServeConfig(bundle="models:/tiny@champion", tracking=registry, **ports, **settings)
    (folder / "serve.yaml").write_text(config.to_yaml())
    environment = os.environ | {"AAI_API_KEY": key, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    environment["AAI_WEBHOOK_SECRET"] = WEBHOOK_SECRET
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "serve", "--config", str(folder / "serve.yaml")],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()[-3000:]
        yield Service(config.url(), bundle, line, config.metrics_port, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "as a container is stopped: it must end cleanly"
        written = (folder / "log").read_text() + line
        assert [secret for secret in (KEY, WEBHOOK_SECRET) if secret in written] == []
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, shared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service of the file's own, with the settings in its SERVED; or that of all files of SHARING, which the first
    starts and the last stops."""
    settings = {"canary": {"share": 0.4, "shadow": 0.4}, **getattr(request.module, "SERVED", {})}
    file, starting = request.node.nodeid, serving(tmp_path_factory.mktemp("serve"), **settings)
    if file not in SHARING:
        with starting as running:
            yield running
        return
    shared.service = shared.service or shared.stack.enter_context(starting)
    yield shared.service
    if file == [path for item in request.session.items if (path := item.nodeid.split("::")[0]) in SHARING][-1]:
        shared.stack.close()


def test_the_ready_line_names_url_model_and_version(service: Service) -> None:
    assert service.url in service.ready_line
    assert "tiny/1@champion" in service.ready_line
    said = (service.bundle.parent / "log").read_text()
    steps = ["fetching models:/tiny@champion", "loading tiny/1@champion, painters: 1", "ready after", "metrics at http"]
    assert sorted(steps, key=said.index) == steps
    health = service.health()
    assert health["model"] == {"name": "tiny", "version": "1", "alias": "champion"}
    assert (health["status"], health["replicas"], health["queue_depth"]) == ("ready", 1, 0)


def test_pictures_are_those_of_the_python_call(service: Service) -> None:
    painter = Painter.load(service.bundle)
    sound = decode_audio(wav(), 30, 10**6, 16_000)
    given = Image.open(io.BytesIO(png(90, 70)))
    for verb in ("generate", "edit", "stylize"):
        request = PaintRequest(seed=11, steps=4, guidance_scale=2)
        arguments = (sound, request) if verb == "generate" else (sound, given, request)
        expected = getattr(painter, verb)(*arguments)[0]
        image = None if verb == "generate" else png(90, 70)
        response = service.post(verb, {"seed": "11", "steps": "4", "guidance_scale": "2"}, image)
        assert response.status_code == 200, response.text
        assert response.headers["x-aai-model"] == "tiny/1@champion"
        assert response.headers["x-aai-bundle"] == service.health()["bundle"]
        painted = Image.open(io.BytesIO(response.content))
        assert np.array_equal(np.asarray(painted), np.asarray(expected)), verb
        assert re.fullmatch(r"aai \d+\.\d+\.\d+ \(commit (?!unknown)\S+\)", painted.info["Software"])


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_asks_for_the_key_paints_and_tells_what_is_wrong(service: Service, tmp_path: Path) -> None:
    """In a real browser."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as engine:
        arguments = ["--no-sandbox", "--disable-gpu"]
        page = engine.chromium.launch(executable_path=BROWSER, args=arguments).new_page()
        page.goto(service.url)
        page.locator("input[name=audio]").set_input_files(
            {"name": "tone.wav", "mimeType": "audio/wav", "buffer": wav()}
        )
        page.locator("summary").click()
        page.locator("input[name=steps]").fill("1")
        page.locator("#paint").click()
        expect(page.locator("#error")).to_contain_text("401")
        page.locator("#key").fill(KEY)
        page.locator("#paint").click()
        expect(page.locator("#pictures img")).to_be_visible(timeout=30_000)
        expect(page.locator("#made")).to_contain_text("tiny/1@champion")
        page.locator("input[name=audio]").set_input_files(
            {"name": "text.txt", "mimeType": "text/plain", "buffer": b"no sound"}
        )
        page.locator("#paint").click()
        expect(page.locator("#error")).to_contain_text("422")


def test_a_mistake_found_by_the_painter_is_a_422(service: Service) -> None:
    response = service.post("generate", {**QUICK, "prompt": "a photo of <elsewhere>"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")
    assert "Traceback" not in response.text


def test_without_the_key_nothing_is_painted(service: Service) -> None:
    response = httpx.post(f"{service.url}/v1/generate", files={"audio": wav()}, timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")


def test_a_huge_upload_is_refused_while_it_streams(service: Service) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        for _ in range(400):
            yield bytes(100_000)

    async def ask() -> httpx.Response:
        headers = {**HEADERS, "content-type": "multipart/form-data; boundary=b"}
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(f"{service.url}/v1/generate", content=endless(), headers=headers)

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "upload_too_large")


def test_hostile_requests_are_refused_in_our_form_and_it_paints_right_after(service: Service) -> None:
    """A sample of tests/e2e/test_hostile_service.py."""
    url, key = httpx.URL(service.url), KEY.encode()
    given = [*list(fields(key))[::20], *list(forms(key))[::3], *oddities(key)]
    assert wrong(attack((url.host, int(url.port or 80)), given)) == []
    assert service.post("generate", QUICK).status_code == 200


async def crowd(service: Service, size: int) -> tuple[list[httpx.Response], int]:
    """Many requests at once, and the deepest queue seen meanwhile."""
    deepest = 0
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def one(seed: int) -> httpx.Response:
            data = {"steps": "10", "seed": str(seed)}
            files = {"audio": wav()}
            return await client.post(f"{service.url}/v1/generate", files=files, data=data, headers=HEADERS)

        posts = asyncio.gather(*(one(seed) for seed in range(size)))
        while not posts.done():
            health = await client.get(f"{service.url}/healthz")
            deepest = max(deepest, health.json()["queue_depth"])
            await asyncio.sleep(0.1)
        return await posts, deepest


def test_a_crowd_is_served_or_told_to_come_back(service: Service) -> None:
    responses, deepest = asyncio.run(crowd(service, 50))
    counts = Counter(response.status_code for response in responses)
    assert set(counts) == {200, 429}, counts
    assert counts[200] >= 8
    assert deepest <= 8
    refused = [response for response in responses if response.status_code == 429]
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert all(response.json()["error"]["code"] == "queue_full" for response in refused)
    pictures = {response.content for response in responses if response.status_code == 200}
    assert len(pictures) == counts[200], "each request has its own picture"


def test_a_request_whose_client_left_is_taken_out_of_the_queue(service: Service) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(timeout=120) as client:

            async def post() -> None:
                data, files = SLOW, {"audio": wav()}
                await client.post(f"{service.url}/v1/generate", files=files, data=data, headers=HEADERS)

            blocker = asyncio.create_task(post())
            await asyncio.to_thread(service.wait_until, painting=1)
            waiting = asyncio.create_task(post())
            await asyncio.to_thread(service.wait_until, queue_depth=1)
            assert (await client.get(service.url)).status_code == 200
            waiting.cancel()
            await asyncio.to_thread(service.wait_until, painting=1, queue_depth=0)
            assert not blocker.done()
            await blocker

    asyncio.run(leave())
    assert service.post("generate", QUICK).status_code == 200


def test_a_foreign_address_needs_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AAI_API_KEY", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "AAI_API_KEY is not set" in capsys.readouterr().err


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: cannot listen"):
            check_address(ServeConfig(port=port))


def test_dry_run_says_what_would_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--bundle", "somewhere", "--port", "8123", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:8123" in printed
    assert "somewhere" in printed


def test_build_app_takes_settings_or_a_file(service: Service, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(f"bundle: {service.bundle}\n")
    assert build_app({"bundle": str(service.bundle)}).__class__.__name__ == "Application"
    assert build_app({"config": str(tmp_path / "serve.yaml"), "port": 9000})
    with pytest.raises(UserError, match="did you mean 'bundle'"):
        build_app({"bundel": "x"})


def test_a_controlnet_has_no_place_in_the_service() -> None:
    with pytest.raises(UserError, match="needs a picture that requests do not carry"):
        ServeConfig.parse({"addons": {"controlnet": "net"}})


def bound(config: ServeConfig) -> tuple[Any, Any]:
    """Gateway and painters as Serve is told."""
    served = ServedModel(name="m", version="1", alias="", sha="s", sample_rate_hz=16_000)
    gateway = application(config, "folder", served, need_key=False)._bound_deployment
    return gateway, gateway.init_args[0]._bound_deployment


def test_painters_are_a_fixed_number_or_come_with_what_is_asked() -> None:
    gateway, painter = bound(ServeConfig.parse({"cluster": {"num_workers": 3}}))
    assert (painter.num_replicas, painter._deployment_config.autoscaling_config) == (3, None)
    assert (gateway.num_replicas, gateway.init_args[3]) == (1, 3 * 8 + 8)
    scaled = {"max_painters": 4, "target_ongoing_requests": 3, "upscale_delay_s": 1}
    config = ServeConfig.parse({"autoscaling": scaled, "gateways": 2, "max_queued_requests": 9})
    gateway, painter = bound(config)
    found = painter._deployment_config.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (1, 4, 3)
    assert (found.upscale_delay_s, found.downscale_delay_s) == (1, 600)
    assert (gateway.num_replicas, painter.max_queued_requests) == (2, 5), "each has its share of the queue"
    assert gateway.init_args[3:5] == (21, 4), "half of 4 x 8 + 9, and of the places of a painter"
    assert gateway.init_args[2]["max_queued_steps"] == config.limits.max_queued_steps / 2
    for each in (gateway, painter):
        assert each._deployment_config.graceful_shutdown_timeout_s > config.limits.request_timeout_s
    assert config.plan().resources["workers"] == "1 to 4 x (1 CPU, 0 GPU)"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"autoscaling": {"min_painters": 2, "max_painters": 2}}, "min_painters 2 is not below max_painters 2"),
        ({"autoscaling": {"max_painters": 4}, "cluster": {"num_workers": 2}}, "leave one out"),
        ({"autoscaling": {"max_painters": 4, "target_ongoing_requests": 11}}, "never reaches max_painters 4"),
        ({"gateways": 9}, "no share in max_queued_requests 8"),
    ],
)
def test_scaling_that_could_not_act_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        ServeConfig.parse(settings)
