"""What Prometheus finds of stages that really run, and that it is what the dashboard and the alerts ask for."""

import inspect
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.dashboard.modules.reporter import reporter_agent

from pipelines.engine import stage_metrics
from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.shards import run_shards
from pipelines.engine.stage_metrics import COUNTERS, GAUGES, StageMetrics, telling
from pipelines.settings import ClusterConfig
from tests.pipelines.engine.test_shards import Writer, WriteResult, WriteShard, make
from tests.scraped import MONITORING, Scraper, missing, of_the_stages, total

CLUSTER = ClusterConfig(num_workers=2)
ENTRY = {"loss": 2.0, "steps_per_s": 3.0, "data_wait_share": 0.1, "skipped_steps": 0, "workers": 2}
NO_GPU = ("ray_node_gpus_utilization", "ray_node_gram_used")
"""Metrics of Ray's that a machine without a GPU does not have."""


class Rejecter(Writer):
    """A worker that rejects a row of each shard."""

    def __call__(self, shard: WriteShard) -> WriteResult:
        return replace(super().__call__(shard), codes={"SILENT": 1})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of the endpoint of a Ray that reports often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "2000")
        connect(CLUSTER)
        yield int(ray.nodes()[0]["MetricsExportPort"])
        shutdown()


def until_complete(scraper: Scraper) -> dict[str, list[str]]:
    """Waits until every query is answered, or for long; what is missing, by query."""
    end_s = time.monotonic() + 30
    while True:
        lacking = {query: found for query in of_the_stages() if (found := missing(query, scraper.seen))}
        lacking = {query: found for query, found in lacking.items() if not any(name in query for name in NO_GPU)}
        if time.monotonic() > end_s or not lacking:
            return lacking
        time.sleep(1)


def test_dashboard_and_alerts_name_only_what_stages_tell(port: int, tmp_path: Path) -> None:
    """Shards by Ray's own workers, and the entries of a training; a whole chain: tests/e2e/test_stage_monitoring.py."""
    with Scraper(port) as scraper:
        run_shards("curate", [make(number) for number in range(6)], Rejecter, {"folder": str(tmp_path)}, CLUSTER)
        with telling("align") as training:
            training.begin_training(9)
            for step in (2, 4):
                training.entry(step, ENTRY, 8)
            training.checkpoint()
            assert until_complete(scraper) == {}
    samples = scraper.seen
    assert samples.keys() >= {f"ray_{name}" for name in (*COUNTERS, *GAUGES)}
    assert total(samples, "ray_aai_pipeline_rows_total", stage="curate", unit="clip") == 60
    assert total(samples, "ray_aai_pipeline_rejects_total", stage="curate", code="SILENT") == 6
    assert total(samples, "ray_aai_pipeline_shards_done", stage="curate") == 6
    assert total(samples, "ray_aai_pipeline_rows_total", stage="align", unit="clip") == 32
    assert total(samples, "ray_aai_train_step", stage="align") == 4


def test_a_gauge_is_told_until_its_stage_ends(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_metrics, "RETELL_S", 0.05)
    told: list[float] = []
    with telling("slow") as metrics:
        monkeypatch.setattr(metrics._gauges["aai_train_step"], "set", lambda value, tags: told.append(value))
        metrics.entry(7, {"loss": float("nan"), "val": 1.0}, 8)
        end_s = time.monotonic() + 10
        while len(told) < 5 and time.monotonic() < end_s:
            time.sleep(0.02)
    count = len(told)
    time.sleep(0.2)
    assert (set(told), len(told)) == ({7}, count)
    assert "aai_train_loss" not in metrics._values, "what is not finite is no figure"
    assert metrics._values["aai_pipeline_running"] == 0


def test_a_restart_takes_no_rows_back(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, added = StageMetrics("restarted"), list[float]()
    rows = metrics._counters["aai_pipeline_rows_total"]
    monkeypatch.setattr(rows, "inc", lambda amount, tags: added.append(amount))
    metrics.begin_training(300, goes_on=True)
    for step in (210, 220, 200, 210):
        metrics.entry(step, {"loss": 1.0}, 2)
    assert added == [20, 20]


def test_metrics_of_gpus_are_ray_s_own() -> None:
    source = inspect.getsource(reporter_agent)
    asked = [name for name in NO_GPU if any(name in query for query in of_the_stages())]
    assert [name for name in asked if f'"{name.removeprefix("ray_")}"' not in source] == []


def test_without_ray_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_metrics, "_is_exported", lambda: False)
    with telling("alone") as metrics:
        metrics.shards(1, 2)
        metrics.result(3, "clip", {"SILENT": 1}, 1.0, 0.5)
        metrics.begin_training(5)
        metrics.entry(1, {"loss": 1.0}, 8)
        metrics.checkpoint()
    assert (metrics._counters, metrics._gauges, metrics._values) == ({}, {}, {})


def test_every_metric_is_documented() -> None:
    page = (MONITORING.parents[1] / "docs" / "monitoring.md").read_text()
    assert [name for name in (*COUNTERS, *GAUGES) if f"`ray_{name}`" not in page] == []
    alerts = re.findall("alert: (.+)", (MONITORING / "alerts.yml").read_text())
    assert [alert for alert in alerts if f"`{alert}`" not in page] == []
