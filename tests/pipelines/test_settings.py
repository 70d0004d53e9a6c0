"""What every command's settings share: YAML and overrides, the plan, the cluster in words."""

from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.settings import ClusterConfig, RayVerbConfig, VerbConfig


class JobConfig(RayVerbConfig):
    """A command of two settings and a cluster."""

    out: str = "${run_dir}/job"
    rows: int = 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("run_dir: r\nout: ${run_dir}/o\ncluster: {num_workers: 3}\n")
    return path


def test_overrides_win_and_what_refers_to_them_follows(file: Path) -> None:
    config = JobConfig.load(file, ["run_dir=s3://b/x", "rows=5", "cluster.gpus_per_worker=0.5"])
    assert (config.out, config.rows) == ("s3://b/x/o", 5)
    assert config.resources() == {"cluster": "this machine", "workers": "3 x (1 CPU, 0.5 GPU)"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.num_worker=2", "did you mean 'num_workers'"),
        ("row=2", "did you mean 'rows'"),
        ("cluster.num_workers=0", "cluster.num_workers=0"),
        ("cluster.cpus_per_worker=0", "cluster.cpus_per_worker=0"),
        ("rows=many", "rows=many"),
        ("rows", "KEY=VALUE"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, message: str, file: Path) -> None:
    with pytest.raises(UserError) as caught:
        JobConfig.load(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cluster_of_an_address_is_named_by_it() -> None:
    assert ClusterConfig(address="ray://head:1", cpus_per_worker=2).describe() == {
        "cluster": "ray://head:1",
        "workers": "2 x (2 CPU, 0 GPU)",
    }


def test_a_command_without_a_plan_says_which() -> None:
    class Planless(VerbConfig):
        """No plan."""

    with pytest.raises(TypeError, match="Planless has no plan"):
        Planless().plan()
