"""The alerts of infra/monitoring fire when they should, and not otherwise: evaluated by Prometheus' own promtool."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from aai.bundle import read_bundle
from pipelines.registry import versions
from tests.e2e.test_rollover import another, registry_of
from tests.pipelines.test_serve import QUICK, crowd, free_port, serving

RULES = Path(__file__).resolve().parents[2] / "infra" / "monitoring" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")

ROWS, REJECTS = "ray_aai_pipeline_rows_total", "ray_aai_pipeline_rejects_total"
REQUESTS, BUCKET = "ray_aai_requests_total", "ray_aai_request_duration_seconds_bucket"
WELL = {
    "ray_aai_painters_running": "2x60",
    "ray_aai_painters_wanted": "2x60",
    "ray_aai_registry_trouble": "0x60",
    "ray_aai_request_timeout_seconds": "120x60",
    'ray_aai_version_refused{version="4"}': "0x60",
    f'{REQUESTS}{{verb="generate", status="200", code="ok"}}': "0+60x60",
    f'{REQUESTS}{{verb="generate", status="429", code="queue_full"}}': "0+1x60",
    f'{BUCKET}{{verb="generate", status="200", le="2.5"}}': "0+60x60",
    f'{BUCKET}{{verb="generate", status="200", le="60.0"}}': "0+60x60",
    f'{BUCKET}{{verb="generate", status="200", le="120.0"}}': "0+60x60",
    f'{BUCKET}{{verb="generate", status="200", le="+Inf"}}': "0+60x60",
    'ray_aai_pipeline_running{stage="curate"}': "1x60",
    'ray_aai_pipeline_running{stage="align"}': "1x60",
    f'{ROWS}{{stage="curate", unit="clip"}}': "0+600x60",
    f'{ROWS}{{stage="align", unit="clip"}}': "0+6000x60",
    f'{REJECTS}{{stage="curate", code="SILENT"}}': "0+60x60",
    'ray_aai_train_data_wait_ratio{stage="align"}': "0.05x60",
    'ray_aai_train_skipped_steps{stage="align"}': "0x60",
    'ray_aai_train_checkpoint_timestamp_seconds{stage="align"}': "0+60x60",
}
"""A service and two stages that are well: series by name, a value a minute."""
ILL: dict[str, dict[str, str]] = {
    "AaiAway": dict.fromkeys(("ray_aai_painters_running", "ray_aai_painters_wanted"), "2x10 stale"),
    "AaiNoPainter": {"ray_aai_painters_running": "2x10 0x50", "ray_aai_painters_wanted": "2x10 0x50"},
    "AaiPainterLost": {"ray_aai_painters_running": "2x10 1x50"},
    "AaiQueueFull": {f'{REQUESTS}{{verb="generate", status="429", code="queue_full"}}': "0+30x60"},
    "AaiSlow": {f'{BUCKET}{{verb="generate", status="200", le="{le}"}}': "0+30x60" for le in ("2.5", "60.0")},
    "AaiFailing": {f'{REQUESTS}{{verb="generate", status="200", code="internal"}}': "0+1x60"},  # in a stream
    "AaiVersionRefused": {'ray_aai_version_refused{version="4"}': "0x10 1x50"},
    "AaiCanaryFails": {'ray_aai_version_pictures_total{role="canary", version="4", outcome="failed"}': "0+1x60"},
    "AaiRegistryAway": {"ray_aai_registry_trouble": "0x10 1x50"},
    "AaiRejectsHigh": {f'{REJECTS}{{stage="curate", code="IO_ERROR"}}': "0+300x60"},
    "AaiStageStuck": {f'{ROWS}{{stage="curate", unit="clip"}}': "0+600x5 3000x55"},
    "AaiStepsNotFinite": {'ray_aai_train_skipped_steps{stage="align"}': "0x38 2 0x21"},
    "AaiDataSlow": {'ray_aai_train_data_wait_ratio{stage="align"}': "0.05x10 0.6x50"},
    "AaiCheckpointOld": {'ray_aai_train_checkpoint_timestamp_seconds{stage="align"}': "-6000x60"},
}
"""What is otherwise when an alert must fire, and no other."""


def fired(changes: dict[str, str], tmp_path: Path) -> set[str]:
    """The alerts that fire after three quarters of an hour of these series in place of WELL's."""
    series = [{"series": labelled(name), "values": values} for name, values in {**WELL, **changes}.items()]
    tests: list[dict[str, Any]] = [
        {"eval_time": "45m", "alertname": alert} for alert in ILL
    ]  # promtool: none is expected
    case = {"interval": "1m", "input_series": series, "alert_rule_test": tests}
    file = tmp_path / "alerts_test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run([str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True)
    told = done.stdout + done.stderr
    found = set(re.findall(r"alertname: (\w+)", told))
    assert ("FAILED" in told) == bool(found) == bool(done.returncode), told
    return found


def labelled(series: str) -> str:
    """A series with the label that Serve puts on all."""
    name, _, rest = series.partition("{")
    return f'{name}{{application="aai"{", " + rest if rest else "}"}'


def test_every_alert_has_a_case_and_says_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == ILL.keys()
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "remedy"}


@needs_promtool
def test_a_service_that_is_well_alerts_nobody(tmp_path: Path) -> None:
    assert fired({}, tmp_path) == set()


@needs_promtool
def test_a_stage_that_ended_alerts_nobody(tmp_path: Path) -> None:
    """Its gauges are forgotten, its counters stand still."""
    gauges = [name for name in WELL if re.match("ray_aai_(train|pipeline_running)", name)]
    ended = {**dict.fromkeys(gauges, "1x5 stale"), f'{ROWS}{{stage="curate", unit="clip"}}': "0+600x5 3000x55"}
    few = {
        f'{REJECTS}{{stage="curate", code="IO_ERROR"}}': "0+300x1 300x59",
        f'{ROWS}{{stage="curate", unit="clip"}}': "0+300x1 300x59",
    }
    assert fired({**ended, 'ray_aai_pipeline_running{stage="curate"}': "1x5 0x2 stale"}, tmp_path) == set()
    assert fired({**ended, **few}, tmp_path) == set(), "a few hundred rows tell nothing"


@needs_promtool
@pytest.mark.parametrize("alert", ILL)
def test_an_alert_fires_for_what_it_is_there_for_alone(alert: str, tmp_path: Path) -> None:
    assert fired(ILL[alert], tmp_path) == {alert}


@contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[str]:
    """A real server that scrapes a real service; its alerts wait for seconds instead of minutes."""
    (folder / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 3s", RULES.read_text()))
    scrape = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}
    often = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings = {"global": often, "rule_files": ["alerts.yml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def until_firing(url: str, alert: str) -> dict[str, str]:
    """Waits until an alert fires; its labels."""
    end_s = time.monotonic() + 90
    while True:
        with suppress(httpx.TransportError):
            alerts = httpx.get(f"{url}/api/v1/alerts").json()["data"]["alerts"]
            firing = {each["labels"]["alertname"]: each["labels"] for each in alerts if each["state"] == "firing"}
            if alert in firing:
                return firing[alert]
        assert time.monotonic() < end_s, alert
        time.sleep(0.5)


@pytest.mark.accept
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_m9_a_real_prometheus_alerts_of_a_real_service(tmp_path: Path) -> None:
    with serving(tmp_path) as running, prometheus(tmp_path, running.metrics_port) as url:
        assert running.post("generate", QUICK).status_code == 200
        for _ in range(4):  # a rate needs values at two times at least
            asyncio.run(crowd(running, 40))
            time.sleep(4)
        assert until_firing(url, "AaiQueueFull")["application"] == "aai"
        cfg, encoder = registry_of(running), read_bundle(running.bundle).config.encoder
        slower = another(running.bundle, tmp_path / "bad", encoder={**encoder, "sample_rate_hz": 8_000})
        versions.set_alias(cfg, "champion", versions.register(cfg, slower, {}, {}))
        assert until_firing(url, "AaiVersionRefused")["version"] == "2"
        versions.delete_alias(cfg, "champion")
        until_firing(url, "AaiRegistryAway")
