"""A12: curate, featurize and align on a Ray cluster of two nodes, reading from and writing to a real S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from aai import storage
from aai.bundle import read_bundle
from aai.encoders.aligner import load_aligner
from aai.toy.writer import write_world
from pipelines import align, curate, featurize
from pipelines.engine import cluster
from pipelines.settings import VerbConfig
from tests.pipelines.conftest import run_here

CLIPS = 100


@pytest.fixture
def two_nodes(s3: str) -> Iterator[str]:
    """A cluster of two nodes on this machine, started with the S3 server's environment; yields its address."""
    cluster.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    cluster.shutdown()
    nodes.shutdown()


def settings(kind: type[VerbConfig], verb: str, base: str, address: str | None, **values: Any) -> Any:
    """The demo's config of a verb under another run_dir and cluster."""
    path = Path(__file__).resolve().parents[2] / "configs" / "demo" / f"{verb}.yaml"
    return kind.load(path, [], {"run_dir": base, "cluster.address": address, **values})


def make_tables(base: str, address: str | None) -> None:
    """curate -> featurize under `base`."""
    curate.run(settings(curate.CONFIG, "curate", base, address, rows_per_shard=25, tracking=None))
    featurize.run(settings(featurize.CONFIG, "featurize", base, address))


def table(base: str, name: str) -> pa.Table:
    """A table without what names its place (the message of a duplicate names the file that was kept)."""
    found = storage.read_table(storage.join(base, name))
    return found.drop_columns([c for c in ("uri", "message") if c in found.column_names]).replace_schema_metadata(None)


def test_a12_s3_and_two_nodes_give_the_tables_of_a_local_run(
    two_nodes: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = str(tmp_path / "run")
    for base in (local, s3):
        write_world(storage.join(base, "world"), CLIPS, seed=5, num_workers=1, progress=False)
    make_tables(s3, two_nodes)
    fit = {"fit.steps": 3, "fit.batch_size": 16, "fit.eval_every": 0, "tracking.uri": f"sqlite:///{tmp_path}/s3.db"}
    align.run(settings(align.CONFIG, "align", s3, two_nodes, **fit))
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    load_aligner(read_bundle(storage.join(s3, "align/bundle")))
    run_here(monkeypatch)
    make_tables(local, None)
    for name in ("curated/accepted", "curated/rejected", "features"):
        ours, theirs = table(s3, name), table(local, name)
        assert ours.num_rows > 0
        assert ours.equals(theirs), name
    assert len(table(local, "curated/accepted")) + len(table(local, "curated/rejected")) == CLIPS
