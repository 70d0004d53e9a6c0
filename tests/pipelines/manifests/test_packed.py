from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest

from pipelines.manifests.packed import _TABLE, BLOCK_ROWS, PackedRows, _rows, have_images
from pipelines.manifests.row import ManifestRow


def rows(count: int) -> list[ManifestRow]:
    """Of every form."""
    made = []
    for number in range(count):
        labels = tuple(f"label {i}" for i in range(number % 3))
        row = ManifestRow(uri=f"/d/{number} ♪.mp4", labels=labels, caption="x" * (number % 5), split="train")
        made.append(replace(row, start_s=0.5, end_s=float(number), split="val") if number % 7 == 0 else row)
    return made


def test_they_come_back_as_they_were_in_any_order() -> None:
    given = rows(3 * BLOCK_ROWS + 5)
    packed = PackedRows(iter(given))
    assert len(packed) == len(given)
    assert list(packed) == given == packed
    for place in (0, -1, BLOCK_ROWS, 5, 2 * BLOCK_ROWS - 1, 0):
        assert packed[place] == given[place]
    assert packed[3:2000:300] == given[3:2000:300]
    assert packed[7].content() == given[7].content()
    with pytest.raises(IndexError):
        packed[len(given)]
    assert packed != given[:-1]
    assert list(PackedRows([])) == []


def test_asking_all_over_the_place_makes_few_rows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = rows(20 * BLOCK_ROWS), Counter[str]()
    packed = PackedRows(given)

    def counted(table: pa.Table) -> list[ManifestRow]:
        made["rows"] += len(table)
        return _rows(table)

    monkeypatch.setattr("pipelines.manifests.packed._rows", counted)
    assert [packed[place] for place in range(len(given))] == given
    assert made.pop("rows") == len(given)
    places = [place * 1999 % len(given) for place in range(len(given))]
    assert sorted(places) == list(range(len(given)))
    assert [packed[place] for place in places] == [given[place] for place in places]
    assert made.pop("rows") == len(given)


def test_a_row_takes_little_more_than_its_texts() -> None:
    given = rows(20_000)
    texts = sum(len(row.uri.encode()) + len(row.caption) + sum(map(len, row.labels)) for row in given)
    assert PackedRows(given).table.nbytes < texts + 60 * len(given)


def test_every_field_is_kept() -> None:
    """What is no column of its own stands in `others`."""
    assert {*_TABLE.names[:-1]} <= set(ManifestRow.__dataclass_fields__)


def test_whether_any_row_has_a_picture() -> None:
    plain, shown = rows(5), [*rows(5), ManifestRow(uri="/a.wav", image_uri="/a.jpg", split="train", extra={"n": 1.0})]
    assert not have_images(plain)
    assert not have_images(PackedRows([*plain, replace(plain[0], extra={"n": 1.0})]))
    assert have_images(shown)
    assert have_images(PackedRows(shown))
    assert list(PackedRows(shown)) == shown
