"""What config files need is read from them as their commands would."""

from pathlib import Path

import pytest

from aai.foundation.identity import FoundationSpec
from pipelines.__main__ import CONFIGS, load_config
from pipelines.checkup.needs import Needs, address_of, needs_of, within
from pipelines.settings import ClusterConfig

VERBS = ("curate", "featurize", "align", "adapt", "evaluate", "promote", "serve")


def shipped(folder: str) -> dict[str, Path]:
    """Config files of the commands: the demo's, or those for real weights."""
    found = {verb: CONFIGS / folder / f"{verb}.yaml" for verb in VERBS}
    return found if folder == "demo" else {verb: next((CONFIGS / verb).glob("*.yaml")) for verb in VERBS}


def test_the_demo_needs_its_folder_and_its_store() -> None:
    needs = needs_of(shipped("demo"))
    assert needs.written == ("runs/demo",)
    assert needs.read == ()
    assert {store.uri for store in needs.stores} == {"sqlite:///runs/demo/mlflow.db"}
    assert needs.foundations == (FoundationSpec(),)
    assert [service.host for service in needs.services] == ["127.0.0.1"]


def test_real_runs_need_what_their_configs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://mine/x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    files = shipped("real")
    needs = needs_of(files)
    assert needs.written == ("s3://mine/x/runs/vggsound_vitl14",)
    assert needs.read == ("s3://mine/x/data/vggsound.csv", "s3://mine/x/data/vggsound")
    assert {store.uri for store in needs.stores} == {"http://tracker:5000"}
    config, _ = load_config("curate", ["--config", str(files["curate"])])
    assert needs.foundations == (config.foundation,)  # type: ignore[attr-defined]
    assert needs.clusters["curate"].num_workers == config.cluster.num_workers  # type: ignore[attr-defined]
    assert [service.host for service in needs.services] == ["0.0.0.0"]


def test_another_run_dir_moves_everything_below_it() -> None:
    needs = needs_of(shipped("demo"), run_dir="s3://b/r/")
    assert needs.written == ("s3://b/r",)
    assert {store.uri for store in needs.stores} == {"sqlite:///s3://b/r//mlflow.db"}


def test_what_a_file_has_wrong_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run_dir: r\nmanifest: m.csv\nout: away\ntracking: {uri: 3, x: 1}\ncluster: 5\n")
    (tmp_path / "b.yaml").write_text("- no\n- mapping\n")
    needs = needs_of({"curate": tmp_path / "a.yaml", "align": tmp_path / "b.yaml", "adapt": tmp_path / "absent.yaml"})
    assert (needs.written, needs.read) == (("r", "away", "runs/demo"), ("m.csv",))


def test_which_cluster_is_meant(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cluster: {address: 'head:6379'}\n")
    needs = needs_of({"align": tmp_path / "a.yaml"})
    assert address_of(ClusterConfig(), needs) == "head:6379"
    assert address_of(ClusterConfig(address="auto"), needs) == "auto"
    assert address_of(ClusterConfig(), Needs()) is None


def test_what_lies_in_a_folder() -> None:
    assert within("runs/demo/world/m.csv", "runs/demo/")
    assert within("s3://b/r", "s3://b/r")
    assert not within("runs/demo2", "runs/demo")
