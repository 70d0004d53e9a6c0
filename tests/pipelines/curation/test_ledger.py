import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.errors import UserError
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.ledger import Entry, Ledger, row_keys
from pipelines.curation.stamps import Stamps
from pipelines.manifests.row import ManifestRow


def row(uri: Path | str, **values: Any) -> ManifestRow:
    return ManifestRow(**{"uri": str(uri), "split": "train", **values})


def entries(*keys: str) -> list[Entry]:
    return [Entry(key, f"{key}.mp4", None, None) for key in keys]


def test_keys_follow_the_file_and_the_window_not_the_caption(tmp_path: Path) -> None:
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    a.write_bytes(b"x")
    b.write_bytes(b"x")
    first = row_keys([row(a), row(b), row(a, start_s=1.0), row(a), row(tmp_path / "none.mp4"), row(a)])
    assert len(set(first)) == 6  # a clip that is listed three times has three keys
    assert row_keys([row(a, caption="new", split="test")]) == first[:1]
    os.utime(a, ns=(1, 1))
    assert row_keys([row(a), row(b)]) != first[:2]
    assert row_keys([row(a), row(b)])[1] == first[1]


def test_stamps_are_asked_for_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question goes through all of a folder of S3."""
    asked, of = [], Stamps.of

    def counted(stamps: Stamps, uris: Sequence[str]) -> list[str]:
        asked.append(len(uris))
        return of(stamps, uris)

    monkeypatch.setattr(Stamps, "of", counted)
    rows = [row(f"/none/{number % 3}.mp4") for number in range(300)]
    assert len(set(row_keys(rows))) == 300
    assert len(asked) <= 4, "two for the rows and two for those that are listed again"


def test_keys_are_what_they_were_in_every_version() -> None:
    """Ledgers on disk carry them."""
    rows = [row("/none/a.mp4"), row("/none/a.mp4"), row("/none/b.mp4", start_s=1.0, end_s=2.5), row("/none/a.mp4")]
    texts = ['["/none/a.mp4", null, null, "missing"]', '["/none/a.mp4", null, null, "missing"]1']
    texts += ['["/none/b.mp4", 1.0, 2.5, "missing"]', '["/none/a.mp4", null, null, "missing"]2']
    keys = row_keys(rows)
    assert list(keys) == [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
    assert keys.places(ClipKeys(list(keys))).tolist() == [0, 1, 2, 3], "each is found where it stands"


def test_a_still_belongs_to_its_key_and_to_the_plan(tmp_path: Path) -> None:
    sound, still = tmp_path / "a.wav", tmp_path / "a.jpg"
    for file in (sound, still):
        file.write_bytes(b"x")
    rows = [row(sound, image_uri=str(still)), row(sound), row(sound, image_uri=str(tmp_path / "b.jpg"))]
    first = list(row_keys(rows))
    assert first[1:2] == list(row_keys([row(sound)])), "as in every version"
    assert len(set(first)) == 3
    os.utime(still, ns=(1, 1))
    assert [one == other for one, other in zip(first, row_keys(rows), strict=True)] == [False, True, True]
    ledger = Ledger(str(tmp_path / "out"))
    ledger.add(entries("a", "b"), rows_per_shard=2)
    ledger.add([Entry("c", "c.wav", None, None, "c.jpg"), *entries("d")], rows_per_shard=2)
    for found in (ledger, Ledger(str(tmp_path / "out"))):
        images = {name: [entry.image_uri for entry in found.shards[name]] for name in found.shards}
        assert images == {"shard-00000": [None, None], "shard-00001": ["c.jpg", None]}
    files = storage.list_files(str(tmp_path / "out"), ".parquet")
    assert ["image_uri" in storage.read_table(file).column_names for file in files] == [False, True]


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
    assert list(again.missing(ClipKeys(["c", "d", "a", "e"]))) == [1, 3]
    assert again.add(entries("d"), rows_per_shard=2) == ["shard-00002"]
    assert planned(str(tmp_path)) == {"shard-00000": ["a", "b"], "shard-00001": ["c"], "shard-00002": ["d"]}


def planned(out: str) -> dict[str, list[str]]:
    """The keys of each shard."""
    return {name: [entry.key for entry in clips] for name, clips in Ledger(out).shards.items()}


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
    assert planned(out) == {"shard-00000": ["a", "b"]}


def test_what_was_tried_again_counts_where_it_was_tried_last(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.add(entries("a", "b", "c"), rows_per_shard=2)
    ledger.add(entries("b"), rows_per_shard=2)
    valid = {name: list(found) for name, found in ledger.valid(ClipKeys(["b", "a"])).items()}
    assert valid == {"shard-00000": ["a"], "shard-00002": ["b"]}
