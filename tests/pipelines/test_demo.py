"""What the demo hands to its stages, and what its summary holds; the whole of it runs end to end elsewhere."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from aai import storage
from pipelines.__main__ import load_config, module_of
from pipelines.demo import STAGES, DemoConfig, stage_settings, summarise


def test_stages_get_the_run_their_overrides_and_the_cluster() -> None:
    config = DemoConfig.parse(
        {"run_dir": "r", "overrides": {"world": ["clips=5"]}, "cluster": {"address": "ray://h:1"}}
    )
    assert stage_settings(config, "world") == ["--set", "run_dir=r", "--set", "clips=5"]  # it needs no cluster
    assert stage_settings(config, "align")[:4] == ["--set", "run_dir=r", "--set", "cluster.address=ray://h:1"]
    assert stage_settings(DemoConfig(run_dir="r"), "align")[:4] == [
        "--set",
        "run_dir=r",
        "--set",
        "cluster.address=null",
    ]


def test_every_stage_reads_what_an_earlier_one_writes() -> None:
    config = DemoConfig(run_dir="/r")
    written: set[str] = set()
    for verb in STAGES:
        settings = load_config(verb, stage_settings(config, verb))[0].model_dump()
        for name in ("manifest", "input", "features", "bundle", "clips"):
            value = settings.get(name)
            if isinstance(value, str) and value.startswith("/r/"):
                assert value.split("/")[2] in written, f"{verb}.{name}"
        if "out" in settings:
            written.add(settings["out"].removeprefix("/r/"))
    assert {"world", "curated", "features", "align", "adapt", "evaluate"} <= written


def test_flags_and_plan(tmp_path: Path) -> None:
    config, _ = load_config("demo", ["--out", str(tmp_path), "--set", "overrides.world=[clips=7]"])
    assert isinstance(config, DemoConfig)
    assert (config.run_dir, config.overrides) == (str(tmp_path), {"world": ("clips=7",)})
    outputs = config.plan().outputs
    assert outputs["report.html"] == f"{tmp_path}/report.html"
    assert set(STAGES) < set(outputs)
    assert all(hasattr(module_of(verb), "run") for verb in STAGES)


def test_the_summary_gathers_every_stages_figures(tmp_path: Path) -> None:
    defects = [{"uri": "clips/a.mp4", "kind": "silent", "expect": "reject", "code": "SILENT"}]
    storage.write_json(f"{tmp_path}/world/defects.json", defects)
    for name, columns in (("accepted", ("uri",)), ("rejected", ("uri", "code"))):
        row = {"uri": f"{tmp_path}/world/clips/a.mp4", "code": "SILENT"}
        rows = pa.Table.from_pylist([{column: row[column] for column in columns}] * (name == "rejected"), pa.schema(
            [(column, pa.string()) for column in columns]))  # fmt: skip
        storage.write_table(f"{tmp_path}/curated/{name}/shard-00000.parquet", rows)
    results: dict[str, dict[str, Any]] = {
        "curate": {"rows_in": 1, "accepted": 0, "rejected": 1, "by_code": {"SILENT": 1}, "seconds": 9},
        "align": {"metrics": {"a": 1}}, "adapt": {"metrics": {"b": 2}}, "generate": {"files": ["/x/y/one.png"]},
        "evaluate": {"foundation": {"f": 3}, "retrieval": {"r": 4}, "generation": {"g": 5}},
        "promote": {"name": "toy", "version": 6, "alias": "champion", "gates": []},
    }  # fmt: skip
    summary = summarise(str(tmp_path), results, {"total": 7.0}, 1.5)
    assert (summary["seconds"], summary["peak_rss_gb"]) == ({"total": 7.0}, 1.5)
    assert {name: summary["curate"][name] for name in ("rows_in", "rejected", "defect_recall", "defect_precision")} == {
        "rows_in": 1, "rejected": 1, "defect_recall": 1.0, "defect_precision": 1.0,
    }  # fmt: skip
    assert [summary[name] for name in ("align", "adapt", "foundation", "retrieval", "generation")] == [
        {"a": 1}, {"b": 2}, {"f": 3}, {"r": 4}, {"g": 5},
    ]  # fmt: skip
    assert summary["registry"] == {"name": "toy", "version": 6, "alias": "champion"}
    assert summary["pictures"] == ["one.png"]
