"""A real chain under a real Prometheus: every panel of the stages shows something, and is drawn to be looked at."""

import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from matplotlib.figure import Figure

from pipelines import demo
from pipelines.__main__ import load_config, run_verb
from pipelines.engine import cluster
from pipelines.settings import ClusterConfig
from tests.e2e.test_monitoring import prometheus
from tests.pipelines.engine.test_stage_metrics import NO_GPU
from tests.pipelines.test_serve import free_port
from tests.scraped import STAGES, panels

Series = dict[str, tuple[list[float], list[float]]]
OVERRIDES = {
    "world": ["clips=240"],
    "curate": ["rows_per_shard=10"],
    "align": ["fit.steps=60", "fit.batch_size=32", "fit.eval_every=0", "fit.log_every=2", "fit.checkpoint_every=20"],
    "adapt": ["fit.steps=20", "fit.batch_size=16", "fit.eval_every=0", "fit.log_every=2", "fit.checkpoint_every=10"],
}
"""The demo's stages in small, and long enough for a few scrapes."""


def series(url: str, panel: dict[str, Any], begin_s: float) -> Series:
    """(times, values) of each line of a panel, by its legend."""
    found: Series = {}
    for target in panel["targets"]:
        expression = target["expr"].replace('"$stage"', '".*"').replace("$__rate_interval", "20s")
        asked = {"query": expression, "start": begin_s, "end": time.time(), "step": 2}
        answer = httpx.get(f"{url}/api/v1/query_range", params=asked, timeout=20).json()
        assert answer["status"] == "success", answer
        for line in answer["data"]["result"]:
            name = re.sub(
                r"\{\{(\w+)\}\}", lambda label, of=line: of["metric"].get(label[1], ""), target["legendFormat"]
            )
            points = [(float(when) - begin_s, float(value)) for when, value in line["values"]]
            found[name] = ([when for when, _ in points], [value for _, value in points])
    return found


def draw(shown: dict[str, Series], file: Path) -> None:
    """The panels side by side, as Grafana has them."""
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(18, 3.2 * rows), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(rows, 3).flat, shown.items(), strict=False):
        for name, (when, values) in lines.items():
            axes.plot(when, values, label=name, marker=".", markersize=3)
        axes.set(title=title, xlabel="seconds", ylim=(0, None))
        if lines:
            axes.legend(fontsize=6)
    figure.savefig(file, dpi=80)


@pytest.mark.accept
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_n6_every_panel_of_a_running_chain_shows_something(tmp_path: Path) -> None:
    port, begin_s = free_port(), time.time()
    cluster.shutdown()
    cluster.connect(ClusterConfig(num_workers=2), metrics_port=port)
    with prometheus(tmp_path, port) as url:
        config = demo.CONFIG.parse({"run_dir": str(tmp_path / "run"), "overrides": OVERRIDES})
        for verb in ("world", "curate", "featurize", "align", "adapt"):
            run_verb(verb, load_config(verb, demo.stage_settings(config, verb))[0])
        asked = [
            panel
            for panel in panels()
            if any(STAGES.search(t["expr"]) or "ray_node" in t["expr"] for t in panel["targets"])
        ]
        shown = {panel["title"]: series(url, panel, begin_s) for panel in asked}
    cluster.shutdown()
    draw(shown, tmp_path / "dashboard.png")
    with_gpu = {p["title"] for p in asked if any(name in t["expr"] for name in NO_GPU for t in p["targets"])}
    assert {title for title, lines in shown.items() if not lines} <= with_gpu
    rows = shown["Rows a second, by stage"]
    assert rows.keys() >= {"curate", "featurize", "align", "adapt"}
    assert all(math.isfinite(value) for _, values in shown["Loss"].values() for value in values)
