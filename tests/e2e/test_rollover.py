"""A service that follows its registry: promotions and rollbacks without a restart or a failed request."""

import io
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from aai.bundle import BundleConfig, read_bundle, write_bundle
from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.proof import read_made
from aai.sampling import PaintRequest
from pipelines.registry import versions
from pipelines.settings import TrackingConfig
from tests.hostile import wav
from tests.pipelines.test_serve import HEADERS, Service, service  # noqa: F401


def another(bundle: Path, folder: Path, **changes: object) -> Path:
    """A bundle with another adapter on the same foundation (or with other settings)."""
    found = read_bundle(bundle)
    config = BundleConfig.parse({**found.config.model_dump(), **changes})
    adapter = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in found.adapter().items()}
    return write_bundle(folder, config, found.aligner(), adapter, {"data_fingerprint": str(folder)}).folder


def registry_of(running: Service) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{running.bundle.parent}/mlflow.db", model_name="tiny")


class Clients:
    """Several clients that ask one picture after another until they are stopped."""

    def __init__(self, running: Service, count: int) -> None:
        self.running, self.stopped = running, threading.Event()
        self.answers: list[tuple[float, int, str]] = []
        self.pictures: dict[str, bytes] = {}
        self.threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def _ask(self) -> None:
        with httpx.Client(headers=HEADERS, timeout=120) as client:
            while not self.stopped.is_set():
                data = {"steps": "2"}
                try:
                    answer = client.post(f"{self.running.url}/v1/generate", files={"audio": wav()}, data=data)
                except httpx.HTTPError as error:
                    self.answers.append((time.monotonic(), 0, repr(error)))
                    continue
                model = answer.headers.get("x-aai-model", answer.text)
                self.answers.append((time.monotonic(), answer.status_code, model))
                if answer.status_code == 200:
                    self.pictures[model] = answer.content

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(120)

    def wait_for(self, version: int, moved_s: float) -> float:
        """Seconds from the move until every answer is of this version."""
        end_s = time.monotonic() + 90
        while True:
            assert time.monotonic() < end_s, self.answers[-3:]
            last = self.answers[-len(self.threads) * 2 :]
            if last and all(f"/{version}@" in model for at, _, model in last if at > moved_s) and last[0][0] > moved_s:
                break
            time.sleep(0.1)
        others = [at for at, _, model in self.answers if f"/{version}@" not in model]
        return max(others, default=moved_s) - moved_s


@pytest.mark.timeout(600)
def test_m2_versions_change_under_load_without_a_failed_request(service: Service, tmp_path: Path) -> None:  # noqa: F811
    cfg = registry_of(service)
    second = versions.register(cfg, another(service.bundle, tmp_path / "second"), {}, {})
    with Clients(service, 4) as clients:
        clients.wait_for(1, 0)
        seconds = []
        for version in (second, 1):  # a promotion, and a rollback
            moved_s = time.monotonic()
            versions.set_alias(cfg, "champion", version)
            seconds.append(clients.wait_for(version, moved_s))
            end_s = time.monotonic() + 30  # the board may be empty for a moment
            while service.health()["serving"] != {f"tiny/{version}@champion": 1}:
                assert time.monotonic() < end_s, service.health()
                time.sleep(0.2)
    counts = Counter((status, model) for _, status, model in clients.answers)
    print(dict(counts), [f"{second:.1f} s from the move to the last answer of the old version" for second in seconds])
    assert {status for status, _ in counts} == {200}
    assert {model for _, model in counts} == {"tiny/1@champion", f"tiny/{second}@champion"}
    sound = decode_audio(wav(), 30, 10**6, 16_000)
    for version, folder in ((1, service.bundle), (second, tmp_path / "second")):
        png = clients.pictures[f"tiny/{version}@champion"]
        ours = Painter.load(folder).generate(sound, PaintRequest(steps=2))[0]
        theirs = np.asarray(Image.open(io.BytesIO(png)), int)
        assert np.abs(theirs - np.asarray(ours, int)).max() <= 1, version  # it was painted together with others
        assert read_made(png)["bundle"] == read_bundle(folder).sha
        assert read_made(png)["model"] == f"tiny/{version}"


@pytest.mark.timeout(300)
def test_a_version_that_cannot_be_served_is_refused_and_told(service: Service, tmp_path: Path) -> None:  # noqa: F811
    cfg, config = registry_of(service), read_bundle(service.bundle).config
    slower = {**config.encoder, "sample_rate_hz": 8_000}
    bad = versions.register(cfg, another(service.bundle, tmp_path / "bad", encoder=slower), {}, {})
    versions.set_alias(cfg, "champion", bad)
    end_s = time.monotonic() + 60
    while not (health := service.health())["refused"]:
        assert time.monotonic() < end_s
        time.sleep(0.2)
    assert list(health["refused"]) == [str(bad)]  # type: ignore[call-overload]
    assert health["status"] == "ready"
    answer = service.post("generate", {"steps": "1"})
    assert answer.headers["x-aai-model"] == "tiny/1@champion"
    versions.delete_alias(cfg, "champion")
    while not (health := service.health())["registry"]:
        assert time.monotonic() < end_s
        time.sleep(0.2)
    assert service.post("generate", {"steps": "1"}).status_code == 200
    versions.set_alias(cfg, "champion", 1)
    while (health := service.health())["registry"] or health["refused"]:
        assert time.monotonic() < end_s
        time.sleep(0.2)
    assert health["serving"] == {"tiny/1@champion": 1}


@pytest.mark.timeout(300)
def test_a_version_on_trial_answers_its_share_of_the_requests(service: Service, tmp_path: Path) -> None:  # noqa: F811
    cfg, (label, tried) = registry_of(service), ("tiny/1@champion", "tiny/{}@candidate")
    folder = another(service.bundle, tmp_path / "tried")
    version = versions.register(cfg, folder, {}, {"gates_passed": "true"})
    versions.set_alias(cfg, "candidate", version)
    end_s = time.monotonic() + 60
    while service.health()["canary"] != {tried.format(version): 1}:
        assert time.monotonic() < end_s, service.health()
        time.sleep(0.2)
    answers = [service.post("generate", {"steps": "2", "seed": str(seed)}) for seed in range(16)]
    models = [answer.headers["x-aai-model"] for answer in answers]
    assert {answer.status_code for answer in answers} == {200}
    assert set(models) == {label, tried.format(version)}  # 16 of one kind: once in 3,500 tries, and always the same
    assert service.health()["model"] == {"name": "tiny", "version": "1", "alias": "champion"}
    seed = models.index(tried.format(version))
    ours = Painter.load(folder).generate(decode_audio(wav(), 30, 10**6, 16_000), PaintRequest(steps=2, seed=seed))[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answers[seed].content))), np.asarray(ours))
    assert read_made(answers[seed].content)["bundle"] == read_bundle(folder).sha
    assert service.post("generate", {"steps": "2", "seed": str(seed)}).headers["x-aai-model"] == models[seed]
    versions.set_version_tags(cfg, version, {"gates_passed": "false"})
    while service.post("generate", {"steps": "2", "seed": str(seed)}).headers["x-aai-model"] != label:
        assert time.monotonic() < end_s
        time.sleep(0.2)
    versions.delete_alias(cfg, "candidate")
    while service.health()["canary"]:
        assert time.monotonic() < end_s
        time.sleep(0.2)
