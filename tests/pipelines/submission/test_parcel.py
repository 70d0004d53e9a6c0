"""What travels with a job."""

from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.submission.cluster_file import ClusterFile
from pipelines.submission.parcel import digest_of, entrypoint, has_address, pack


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config of one's own, from which commands are given."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "curate.yaml").write_text("run_dir: /data/run\nmanifest: ${run_dir}/m.csv\nout: /data/out\n")
    (tmp_path / "mine" / "run.yaml").write_text(
        "run_dir: s3://bucket/run\nstages: [{verb: curate, config: mine/curate.yaml}, "
        "{verb: align, config: configs/demo/align.yaml}]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(cluster: ClusterFile, *words: str) -> list[str]:
    """The files that travel."""
    into = Path("parcel")
    into.mkdir()
    pack(cluster, words[0], words[1:], into)
    return sorted(file.relative_to(into).as_posix() for file in into.rglob("*") if file.is_file())


def test_a_config_travels_by_its_name(here: Path) -> None:
    assert packed(ClusterFile(), "curate", "--config", "mine/curate.yaml") == ["mine/curate.yaml"]


def test_a_chain_takes_the_configs_of_its_stages_along(here: Path) -> None:
    # The shipped ones are on the nodes.
    assert packed(ClusterFile(), "run", "--config", "mine/run.yaml") == ["mine/curate.yaml", "mine/run.yaml"]


def test_the_code_travels_where_the_nodes_have_none(here: Path) -> None:
    files = packed(ClusterFile(code="package"), "curate", "--config", "mine/curate.yaml")
    assert {"mine/curate.yaml", "aai/storage.py", "pipelines/curate.py", "configs/demo/curate.yaml"} <= set(files)
    assert not [file for file in files if "__pycache__" in file]


def test_nothing_travels_to_a_folder_that_all_share(here: Path) -> None:
    assert packed(ClusterFile(folder="."), "curate", "--config", "mine/curate.yaml") == []
    with pytest.raises(UserError, match="is not the file of that name in"):
        pack(ClusterFile(folder=str(here / "mine")), "curate", ["--config", "mine/curate.yaml"], here)
    with pytest.raises(UserError, match="is no folder of this machine"):
        pack(ClusterFile(folder="/nowhere"), "curate", ["--config", "mine/curate.yaml"], here)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["curate", "--config", "mine/curate.yaml", "--set", "run_dir=runs/x"], "ends with the job"),
        (["curate", "--config", "mine/curate.yaml", "--set", "out=curated"], "ends with the job"),
        (["curate", "--config", "mine/curate.yaml", "--set", "filters.nothing=1"], "unknown key"),
        (["curate", "--config", "nowhere.yaml"], "no such file"),
        (["featurize"], "ends with the job"),  # the demo's, under runs/
        (["curate", "--config", "mine/curate.yaml", "--set", "manifest=clips.csv"], "clips.csv: is relative"),
        (["curate", "--config", "mine/curate.yaml", "--set", "exclude=left.txt"], "left.txt: is relative"),
        (["curate", "--config", "mine/curate.yaml", "--set", "tracking.uri=sqlite:///mlflow.db"], "mlflow.db: is rel"),
        (["adapt", "--set", "run_dir=/data", "--set", "signing.private_key=key.pem"], "key.pem: is relative"),
        (["promote", "--set", "run_dir=/data", "--set", "trust.public_keys=[keys/a.pem]"], "keys/a.pem: is"),
        (
            ["curate", "--config", "mine/curate.yaml", "--set", "signals={a: {table: s.parquet, min: 1}}"],
            "s.parquet: is",
        ),
        (["run", "--config", "mine/run.yaml", "--set", "stages=[{verb: world, config: none.yaml}]"], "no such file"),
    ],
)
def test_what_could_not_work_is_refused_here(here: Path, words: list[str], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        pack(ClusterFile(), words[0], words[1:], here / "parcel")


def test_a_config_from_elsewhere_cannot_travel(here: Path) -> None:
    with pytest.raises(UserError, match="is not below this folder"):
        pack(ClusterFile(), "curate", ["--config", str(here / "mine" / "curate.yaml")], here / "parcel")


def test_a_sweep_takes_the_config_that_it_begins_from_along(here: Path) -> None:
    (here / "mine" / "align.yaml").write_text("features: /data/features\nout: /data/align\n")
    (here / "mine" / "tune.yaml").write_text("run_dir: /data\nbase: mine/align.yaml\nout: /data/tune\n")
    (here / "mine" / "lost.yaml").write_text("features: features\nout: /data/align\n")
    with pytest.raises(UserError, match="features: is relative"):
        packed(ClusterFile(), "tune", "--config", "mine/tune.yaml", "--base", "mine/lost.yaml")
    (here / "parcel").rename(here / "refused")
    store = ["--set", "overrides.tracking.uri=https://mlflow.example.org"]
    assert packed(ClusterFile(), "tune", "--config", "mine/tune.yaml", *store) == ["mine/align.yaml", "mine/tune.yaml"]


@pytest.mark.parametrize(
    "word",
    ["tracking.uri=https://me:hunter22@example.org", "--set=tracking.uri=http://hunter22@host", "hub.token=hunter22"],
)  # fmt: skip
def test_a_secret_in_the_command_is_not_sent_or_shown(here: Path, word: str) -> None:
    with pytest.raises(UserError, match="holds a secret, which the dashboard would show") as caught:
        pack(ClusterFile(), "align", [word], here / "parcel")
    assert "hunter22" not in str(caught.value)


def test_the_shell_line() -> None:
    words = ["--set", "prompts=['a {caption}']"]
    assert entrypoint(ClusterFile(), "featurize", words, True) == (
        """aai featurize --set 'prompts=['"'"'a {caption}'"'"']' --address auto"""
    )
    assert entrypoint(ClusterFile(code="package"), "promote", [], False) == "python -P -m pipelines promote"
    line = entrypoint(ClusterFile(folder="/shared/my project"), "run", ["--address", "head:6379"], True)
    assert line == "cd '/shared/my project' && aai run --address head:6379"
    assert not has_address(["--set", "run_dir=x"])
    for words in (["--set", "cluster.address=x"], ["--set=cluster.address=x"], ["--address=x"], ["--set", "address=x"]):
        assert has_address(words)


def test_the_same_job_has_the_same_digest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "mine").mkdir(parents=True)
        (tmp_path / name / "mine" / "x.yaml").write_text("clips: 3\n")
    assert (
        digest_of(tmp_path / "a", "aai x") == digest_of(tmp_path / "b", "aai x") != digest_of(tmp_path / "b", "aai y")
    )
    before = digest_of(tmp_path / "b", "aai x")
    (tmp_path / "b" / "mine" / "x.yaml").write_text("clips: 4\n")
    assert digest_of(tmp_path / "b", "aai x") != before
