"""The columns a data card reads: codes as bits, rows by number, the clips that were kept."""

from pathlib import Path

import pyarrow as pa

from aai import storage
from aai.schema import REJECT_TABLE
from pipelines.curation.card_data import NUMBERS, Gathered, fetch, locate, read_rows
from pipelines.curation.card_figures import funnel
from tests.tiny import write_clip_table


def test_more_codes_than_bits_are_summed_up() -> None:
    rows = Gathered()
    columns = {name: pa.array([1.0] * 200) for name in NUMBERS}
    columns |= {"labels": pa.array([["a"]] * 200), "split": pa.array(["t"] * 200), "clip_id": ["c"] * 200}
    columns |= {"flags": pa.array([[f"C{i:03d}"] for i in range(200)])}
    rows.add(pa.table(columns))
    rows.add(pa.table(columns))
    counts = {flag["code"]: flag["rows"] for flag in funnel(rows.rows({"x": 1, "y": 1}))["flags"]}
    assert (len(counts), counts["C000"], counts["OTHER"]) == (64, 2, 2 * (200 - 63))


def test_rows_are_found_by_number_across_files_and_row_groups(tmp_path: Path) -> None:
    write_clip_table(tmp_path / "accepted", 2, 3)
    first = storage.read_table(f"{tmp_path}/accepted/shard-00000.parquet")
    storage.write_table(f"{tmp_path}/accepted/shard-00000.parquet", first, row_group_size=2)
    reject = {"uri": "/lost.mp4", "caption": "", "labels": [], "split": "test", "stage": "read", "code": "IO_ERROR"}
    reject |= {"message": "same clip as /a (1).mp4 (clip-1-1) of split train", "transient": True, "thumbnail": b"t"}
    storage.write_table(f"{tmp_path}/rejected/shard-00000.parquet", pa.Table.from_pylist([reject], REJECT_TABLE))
    rows = read_rows(str(tmp_path))
    assert rows.starts.tolist() == [0, 3, 6, 7]
    assert rows.accepted.tolist() == [True] * 6 + [False]
    assert rows.transient.tolist() == [False] * 6 + [True]
    assert locate(rows, ["clip-1-1", "clip-0-2", "clip-nowhere"]) == {"clip-0-2": 2, "clip-1-1": 4}
    found = fetch(rows, [6, 2, 4, 2])
    assert {row: entry["uri"] for row, entry in found.items()} == {
        2: "clips/0-2.mp4", 4: "clips/1-1.mp4", 6: "/lost.mp4",
    }  # fmt: skip
    assert (found[6]["picture"], found[6]["message"]) == (b"t", reject["message"])
    assert found[4]["picture"][:2] == b"\xff\xd8"
    assert fetch(rows, [4], pictures=False)[4] == {
        "clip_id": "clip-1-1", "uri": "clips/1-1.mp4", "split": "train", "message": "", "picture": None,
    }  # fmt: skip
    kept = rows.duplicates
    assert (kept.row, kept.kept, kept.kept_split, kept.split) == ([6], ["clip-1-1"], ["train"], ["test"])
    assert rows.hours(rows.accepted) == round(6 * 2 / 3600, 4)
