"""The registry on a real sqlite store and a real tracking server; no pickle."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from aai.bundle import PICKLE_SUFFIXES, Bundle, BundleConfig, read_bundle, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import write_wav
from pipelines.registry import tracking, versions
from pipelines.settings import TrackingConfig
from tests.certificates import for_this_machine
from tests.pipelines.conftest import python
from tests.tiny import paintable_bundle


@pytest.fixture
def cfg(empty_store: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    # An experiment keeps its artifact folder, and the copy's own must not be the template's.
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test", model_name="toy")


def make_bundle(folder: Path, seed: int) -> Bundle:
    """A bundle of meaningless weights."""
    for name in ("clip", "sd"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(1)}, folder / name / "m.safetensors")
    spec = FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "sd"))
    config = BundleConfig(foundation=spec, encoder={}, adapter={})
    weights = {"w": torch.full((3,), float(seed))}
    return write_bundle(folder / "bundle", config, weights, weights, {"data_fingerprint": f"d{seed}"})


def client(cfg: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=cfg.uri, registry_uri=cfg.uri)


def test_same_content_same_version(cfg: TrackingConfig, tmp_path: Path) -> None:
    one, two = make_bundle(tmp_path / "1", 1), make_bundle(tmp_path / "2", 2)
    assert versions.register(cfg, one.folder, {"r1": 0.1}, {"reason": "a"}) == 1
    assert versions.register(cfg, two.folder, {}, {}) == 2
    assert versions.register(cfg, one.folder, {"r1": 0.2}, {"reason": "b"}) == 1
    tags = versions.version_tags(cfg, 1)
    assert tags["bundle_sha"] == one.sha
    assert (tags["reason"], json.loads(tags["metrics"])) == ("a", {"r1": 0.1})  # what is recorded stays
    assert versions.find_version(cfg, "unknown") is None


def test_aliases_and_pins(cfg: TrackingConfig, tmp_path: Path) -> None:
    assert versions.aliases(cfg, "toy") == {}
    for seed in (1, 2):
        versions.register(cfg, make_bundle(tmp_path / str(seed), seed).folder, {}, {})
    versions.set_alias(cfg, "champion", 1)
    assert versions.get_alias(cfg, "champion") == 1
    assert versions.get_alias(cfg, "previous") is None
    pinned = versions.pin_bundle("models:/toy@champion", cfg)
    assert pinned == ("models:/toy/1", "toy", "1", "champion")
    versions.set_alias(cfg, "champion", 2)
    assert versions.pin_bundle("models:/toy@champion", cfg)[0] == "models:/toy/2"
    for uri, weight in ((pinned[0], 1), ("models:/toy@champion", 2)):
        folder = versions.resolve_bundle(uri, cfg)
        assert read_bundle(folder).adapter()["w"].tolist() == [weight] * 3
    versions.delete_alias(cfg, "champion")
    assert versions.aliases(cfg, "toy") == {}
    assert versions.pin_bundle("some/folder", cfg) == ("some/folder", "", "", "")
    assert versions.resolve_bundle(str(tmp_path / "1" / "bundle"), cfg) == str(tmp_path / "1" / "bundle")


def test_tags_of_the_registered_model(cfg: TrackingConfig, tmp_path: Path) -> None:
    assert versions.model_tags(cfg) == {}
    versions.register(cfg, make_bundle(tmp_path / "1", 1).folder, {}, {})
    versions.set_model_tag(cfg, "move-champion", "{}")
    assert versions.model_tags(cfg) == {"move-champion": "{}"}
    for _ in range(2):  # it may be absent
        versions.delete_model_tag(cfg, "move-champion")
    assert versions.model_tags(cfg) == {}


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("models:/toy@staging", r"no alias 'staging' .*aliases of toy: champion \(version 1\)"),
        ("models:/other@champion", "no alias 'champion' of model 'other' .*aliases of other: none"),
        ("models:/toy/7", "models:/toy/7: no such version"),
        ("models:/toy", "write models:/NAME@ALIAS"),
        ("models:/toy@champion", "the artifact store was changed"),
    ],
)
def test_what_cannot_be_resolved(cfg: TrackingConfig, tmp_path: Path, uri: str, rule: str) -> None:
    versions.set_alias(cfg, "champion", versions.register(cfg, make_bundle(tmp_path / "1", 1).folder, {}, {}))
    if uri.endswith("toy@champion"):  # a whole bundle, but another one than was registered
        stored = Path(versions.resolve_bundle(uri, cfg))
        shutil.rmtree(stored)
        shutil.copytree(make_bundle(tmp_path / "2", 2).folder, stored)
    with pytest.raises(UserError, match=rule):
        versions.resolve_bundle(uri, cfg)


def test_champion_paints_in_a_fresh_process_without_pickle(cfg: TrackingConfig, tmp_path: Path) -> None:
    version = versions.register(cfg, paintable_bundle(tmp_path / "b"), {}, {})
    versions.set_alias(cfg, "champion", version)
    names = [path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert {"MLmodel", "config.yaml", "meta.json", "aligner.safetensors", "adapter.safetensors"} <= set(names)
    assert not [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    write_wav(str(tmp_path / "noise.wav"), torch.randn(16_000).mul(0.1).numpy(), 16_000)
    code = """
        import os, sys
        import mlflow, pandas as pd
        mlflow.set_tracking_uri(sys.argv[1])
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        model = mlflow.pyfunc.load_model("models:/toy@champion")
        audio = open(sys.argv[2], "rb").read()
        table = pd.DataFrame({"audio": [audio, audio], "prompt": ["a sketch of <sound>", None]})
        for png in model.predict(table):
            print(png[:8].hex(), b"Software\\0aai " in png)
    """
    out, err = python(code, cfg.uri, str(tmp_path / "noise.wav")).communicate(timeout=300)
    assert out.split() == [b"\x89PNG\r\n\x1a\n".hex(), "True"] * 2, err


@contextmanager
def serving(folder: Path, store: str, artifacts: str = "", workers: int = 1, tls: str = "") -> Iterator[str]:
    """The address of an `mlflow server` over a store; what is uploaded lies in folder/served, or in `artifacts`.

    tls: uvicorn's options for it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
    options += ["--artifacts-destination", artifacts or str(folder / "served")]
    options += ["--uvicorn-opts", tls] if tls else []
    command = [sys.executable, "-m", "mlflow", "server", *options]
    address = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as sink:
        server = subprocess.Popen(command, cwd=folder, stdout=sink, stderr=sink, start_new_session=True)
        try:
            wait_for(TrackingConfig(uri=address), folder / "server.log")
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # on SIGTERM it waits for open connections
            server.wait(timeout=20)


def test_a_tracking_server_of_a_private_authority_stores_and_returns_bundles(
    cfg: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers over plain HTTP: tests/e2e/test_promotions.py."""
    key, certificate = for_this_machine(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with serving(tmp_path, cfg.uri, tls=f"--ssl-keyfile={key} --ssl-certfile={certificate}") as address:
        remote = TrackingConfig(uri=address, experiment="remote", model_name="toy")
        made = make_bundle(tmp_path / "1", 1)
        versions.set_alias(remote, "champion", versions.register(remote, made.folder, {"r1": 1}, {"a": "b"}))
        assert versions.register(remote, made.folder, {}, {}) == 1
        folder = versions.resolve_bundle("models:/toy@champion", remote)
        assert read_bundle(folder).sha == made.sha
        assert not folder.startswith(str(tmp_path))
        with pytest.raises(UserError, match=r"no alias 'x' .* champion \(version 1\)"):
            versions.resolve_bundle("models:/toy@x", remote)
        shutil.rmtree(tmp_path / "served")
        with pytest.raises(UserError, match=r"^bundle=models:/toy/1: the registered version holds no bundle"):
            versions.resolve_bundle("models:/toy/1", remote, str(tmp_path / "into"))


def wait_for(cfg: TrackingConfig, log: Path) -> None:
    """Opens a run once the server answers; before it listens nobody asks, who would wait ever longer between tries."""
    place = urlsplit(cfg.uri or "")
    for attempt in range(480):
        with socket.socket() as probe:
            if probe.connect_ex((place.hostname, place.port)) == 0:
                with suppress(UserError), tracking.run(cfg, f"attempt {attempt}"):
                    return
        time.sleep(0.25)
    pytest.fail(log.read_text()[-2000:])
