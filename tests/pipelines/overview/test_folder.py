"""A stage's folder as a listing shows it: what is read may be gone since, or be half of something."""

from pathlib import Path

import pytest
import torch

from aai import storage
from aai.fit import State
from pipelines.overview.folder import TAIL_BYTES, StageFolder


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_what_a_listing_tells(uri: str) -> None:
    for name in ("accepted/shard-00000.parquet", "accepted/shard-00001.parquet", "accepted/x.json", "curate.json"):
        storage.write_bytes(f"{uri}/out/{name}", b"[1]")
    folder = StageFolder(f"{uri}/out")
    assert folder.shards("accepted") == {"shard-00000", "shard-00001"}
    assert folder.shards() == set()
    assert folder.below("accepted").keys() == {"shard-00000.parquet", "shard-00001.parquet", "x.json"}
    assert folder.json("curate.json") is None, "it is no object"
    assert folder.json("absent.json") is None
    assert folder.last_write_s is not None
    assert StageFolder(f"{uri}/out", depth=1).files.keys() == {"curate.json"}
    assert (StageFolder(f"{uri}/absent").files, StageFolder(f"{uri}/absent").last_write_s) == ({}, None)


def test_the_end_of_a_history_is_enough(uri: str) -> None:
    lines = "".join(f'{{"step": {step}}}\n' for step in range(10_000))
    storage.write_bytes(f"{uri}/history.jsonl", lines.encode())
    assert len(lines) > 2 * TAIL_BYTES
    entries = list(StageFolder(uri).last_entries("history.jsonl"))
    assert [entry["step"] for entry in entries] == list(range(9_999, 9_999 - len(entries), -1))
    assert 1000 < len(entries) < 10_000
    assert list(StageFolder(uri).last_entries("absent.jsonl")) == []


def test_the_header_of_a_checkpoint_is_enough(uri: str, tmp_path: Path) -> None:
    State(7, {"w": torch.zeros(100)}, {}).save(tmp_path / "state")
    storage.write_bytes(f"{uri}/c/state.safetensors", (tmp_path / "state").read_bytes())
    assert StageFolder(uri).safetensors_about("c/state.safetensors")["step"] == "7"
    storage.write_bytes(f"{uri}/c/state.safetensors", b"half of it")
    assert StageFolder(uri).safetensors_about("c/state.safetensors") == {}


def test_what_is_gone_since_the_listing_is_no_error(uri: str) -> None:
    for name in ("a.json", "history.jsonl", "state.safetensors"):
        storage.write_bytes(f"{uri}/out/{name}", b"{}")
    folder = StageFolder(f"{uri}/out")
    storage.remove(f"{uri}/out")
    assert folder.json("a.json") is None
    assert list(folder.last_entries("history.jsonl")) == []
    assert folder.safetensors_about("state.safetensors") == {}
    assert folder.holding is None
