"""Figures of a running training against a real MLflow server that goes away and comes back."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from aai.errors import UserError
from aai.png import encode_png
from pipelines.registry import live, tracking
from pipelines.settings import TrackingConfig


class Server:
    """An MLflow server on one port, with one database, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.config = TrackingConfig(uri=f"http://127.0.0.1:{self.port}", experiment="live")

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), *store]
        with (self.folder / "server.log").open("ab") as sink:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=sink, stderr=sink, start_new_session=True)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=20)

    def wait(self) -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            try:
                with tracking.run(self.config, "probe"):
                    return
            except UserError:
                time.sleep(0.5)
        pytest.fail((self.folder / "server.log").read_text()[-2000:])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(live, "RETRY_S", 0.3)
    monkeypatch.setattr(live, "PICTURE_RETRY_S", 0.3)
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")):
        monkeypatch.setenv(name, value)
    found = Server(tmp_path)
    found.start()
    yield found
    found.stop()


def fail_without(server: Server) -> None:
    """A training that fails while the server is away."""
    with tracking.run(server.config, "align") as run, live.sender(run) as send:
        server.stop()
        send.figures(1, {"loss": 1.0})
        raise ZeroDivisionError


def logged(run: tracking.OpenRun, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name)]


def pictures(run: tracking.OpenRun) -> list[tuple[int, tuple[int, int], object]]:
    """(step, size, first pixel) of those that the UI shows by step."""
    found = []
    for item in run.client.list_artifacts(run.run_id, "images"):
        if item.path.endswith(".png"):
            name, _, step, *_ = item.path.removeprefix("images/").split("+")
            assert name == live.SAMPLES
            with Image.open(run.client.download_artifacts(run.run_id, item.path)) as image:
                found.append((int(step), image.size, image.getpixel((0, 0))))
    return found


def figures_pass_a_picture_that_fails(server: Server) -> None:
    """While it is tried again."""
    with tracking.run(server.config, "adapt") as run, live.sender(run) as send:
        send.picture(1, b"no picture")
        send.figures(1, {"loss": 1.0})
        deadline_s = time.monotonic() + 30
        while set(logged(run, "loss")) != {(1, 1.0)}:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def test_what_cannot_be_sent_is_given_up_in_time_and_the_next_one_is_sent() -> None:
    tries, sent = [], threading.Event()

    def fail() -> None:
        tries.append(1)
        raise OSError("no storage")

    line = live.Line("pictures", retry_s=0.02, patience_s=0.2)
    line.put(fail)
    line.put(sent.set)
    assert sent.wait(timeout=10)
    assert 2 <= len(tries) <= 11
    line.finish(10)
    assert line.unsent == 1


def test_a_server_that_goes_away_and_comes_back_has_every_figure(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.wait()
    with tracking.run(server.config, "align") as run:
        with live.sender(run) as send:
            send.figures(1, {"loss": 3.0})
            deadline_s = time.monotonic() + 30
            while logged(run, "loss") != [(1, 3.0)]:  # while it runs, not at the end
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            server.stop()
            begin_s = time.monotonic()
            for step in (2, 3, 4):
                send.figures(step, {"loss": 3.0 - step / 10})
            send.picture(4, encode_png(Image.new("RGB", (3, 2), "red")))
            assert time.monotonic() - begin_s < 0.1, "the training does not wait"
            time.sleep(1.0)
            server.start()
        # A request that the server answered too late was sent again: the same figure twice does no harm.
        assert sorted(set(logged(run, "loss"))) == [(1, 3.0), (2, 2.8), (3, 2.7), (4, 2.6)]
        assert set(pictures(run)) == {(4, (3, 2), (255, 0, 0))}
    assert "MLflow does not take figures for now" in caplog.text

    # One that stays away is waited for, then told of, and ends nothing.
    monkeypatch.setattr(live, "PATIENCE_S", 1.0)
    with tracking.run(server.config, "align") as run:
        with live.sender(run) as send:
            server.stop()
            send.figures(1, {"loss": 1.0})
            send.figures(2, {"loss": 1.0})
        assert "MLflow got 2 figures less than were written here" in caplog.text
    assert "MLflow was not told that the run" in caplog.text

    # Pictures that nobody takes hold no figure up, and are given up.
    server.start()
    server.wait()
    figures_pass_a_picture_that_fails(server)
    assert "MLflow got 1 pictures less than were written here" in caplog.text

    # An error of the training does not wait for it.
    monkeypatch.setattr(live, "PATIENCE_S", 600.0)
    begin_s = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        fail_without(server)
    assert time.monotonic() - begin_s < 30
