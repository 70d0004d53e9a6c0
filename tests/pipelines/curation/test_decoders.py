"""Who decoded the rows of a curation, told where it was not today's decoder."""

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from aai import storage
from aai.media.measure import DECODER
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.decoders import DecoderCounts, current_decoders, older_rows
from pipelines.curation.layout import MEASURED, shard_file
from pipelines.curation.ledger import Entry, Ledger
from pipelines.curation.measured import MEASURED_TABLE, MeasuredTables

OLD = [
    ("a", None, None), ("b", "decode", "NO_AUDIO"), ("c", "decode", "UNREADABLE"), ("d", "read", "IO_ERROR"),
    ("gone", "decode", "TIMEOUT"),
]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> str:
    """A shard without the column, of before, and one of today."""
    old = pa.Table.from_pylist([dict(zip(("key", "stage", "code"), row, strict=True)) for row in OLD], MEASURED_TABLE)
    new = [{"key": "e", "decoder": DECODER}, {"key": "f", "decoder": DECODER, "stage": "decode", "code": "NO_VIDEO"}]
    tables = old.drop_columns(["decoder"]), pa.Table.from_pylist(new, MEASURED_TABLE)
    for number, table in enumerate(tables):
        storage.write_table(shard_file(str(tmp_path), MEASURED, f"shard-{number:05d}"), table)
        Ledger(str(tmp_path)).add([Entry(key, "uri", None, None) for key in table["key"].to_pylist()], 10)
    return str(tmp_path)


def test_rows_are_counted_by_who_decoded_them(out: str) -> None:
    counts = DecoderCounts()
    for _, table in MeasuredTables(out).wanted({"shard-00000": ClipKeys("abcd"), "shard-00001": ClipKeys("ef")}):
        counts.add(table)
    assert counts.read_by() == {
        "1": {"rows": 3, "undecodable": {"NO_AUDIO": 1, "UNREADABLE": 1}},
        DECODER: {"rows": 2, "undecodable": {"NO_VIDEO": 1}},
    }


def test_a_run_over_older_rows_says_what_may_be_done(out: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = ClipKeys("abcdef")
    with caplog.at_level(logging.WARNING):
        current_decoders(out, {}, keys)
    assert caplog.messages == [
        f"curate: of 5 decoded rows 3 by 1 and not by {DECODER}; they stay; --retry NO_AUDIO,UNREADABLE tries the 2 "
        "again that could not be decoded; another out decodes all anew"
    ]
    caplog.clear()
    current_decoders("/nowhere", {"decoders": [DECODER]}, keys)  # known: the tables are not read
    current_decoders(out, {}, ClipKeys("ef"))
    assert not caplog.messages


def test_old_rows_of_which_none_failed() -> None:
    assert older_rows({DECODER: {"rows": 2, "undecodable": {}}}) is None
    told = older_rows({"1": {"rows": 2000, "undecodable": {}}})
    assert told is not None
    assert "2,000 by 1" in told
    assert "--retry changes nothing" in told
