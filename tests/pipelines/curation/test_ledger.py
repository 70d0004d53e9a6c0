import os
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.errors import UserError
from pipelines.curation.ledger import Entry, Ledger, row_keys
from pipelines.manifests.row import ManifestRow


def row(uri: Path | str, **values: Any) -> ManifestRow:
    return ManifestRow(**{"uri": str(uri), "split": "train", **values})


def entries(*keys: str) -> list[Entry]:
    return [Entry(key, f"{key}.mp4", None, None) for key in keys]


def test_keys_follow_the_file_and_the_window_not_the_caption(tmp_path: Path) -> None:
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    a.write_bytes(b"x")
    b.write_bytes(b"x")
    first = row_keys([row(a), row(b), row(a, start_s=1.0), row(a), row(tmp_path / "none.mp4")])
    assert len(set(first)) == 5  # a clip that is listed twice has two keys
    assert row_keys([row(a, caption="new", split="test")]) == first[:1]
    os.utime(a, ns=(1, 1))
    assert row_keys([row(a), row(b)]) != first[:2]
    assert row_keys([row(a), row(b)])[1] == first[1]


def test_s3_keys_follow_the_content(s3: str) -> None:
    uri = storage.join(s3, "a.mp4")
    missing = row_keys([row(uri)])
    storage.write_bytes(uri, b"one")
    one = row_keys([row(uri)])
    storage.write_bytes(uri, b"two")
    assert len({*missing, *one, *row_keys([row(uri)])}) == 3


def test_batches_add_up_and_survive(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.add(entries("a", "b", "c"), rows_per_shard=2) == ["shard-00000", "shard-00001"]
    assert ledger.add([], rows_per_shard=2) == []
    again = Ledger(str(tmp_path))
    assert again.shards == ledger.shards
    assert list(again.missing(["c", "d", "a", "e"])) == [1, 3]
    assert again.add(entries("d"), rows_per_shard=2) == ["shard-00002"]
    assert Ledger(str(tmp_path)).shard_of == {
        "a": "shard-00000", "b": "shard-00000", "c": "shard-00001", "d": "shard-00002",
    }  # fmt: skip


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output folder of either kind."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_a_batch_of_another_ledger_is_never_replaced(out: str) -> None:
    first, second = Ledger(out), Ledger(out)
    first.add(entries("a", "b"), rows_per_shard=2)
    with pytest.raises(UserError, match=r"another run has planned _plan/batch-00000\.parquet"):
        second.add(entries("c"), rows_per_shard=2)
    assert second.shards == {}
    assert Ledger(out).shard_of == {"a": "shard-00000", "b": "shard-00000"}


def test_what_was_tried_again_counts_where_it_was_tried_last(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.add(entries("a", "b", "c"), rows_per_shard=2)
    ledger.add(entries("b"), rows_per_shard=2)
    valid = {name: [e.key for e in found] for name, found in ledger.valid({"a", "b"}).items()}
    assert valid == {"shard-00000": ["a"], "shard-00002": ["b"]}
