"""Footers and columns of many files: what is read, and in how many requests of a real S3 server."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from pipelines.engine.columns import open_parquet, read_columns, read_footers
from tests.counting import counted

LARGE = 200_000
"""Bytes of what is not wanted: more than comes with a footer."""


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of either kind."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def write(base: str, files: int, groups: int = 1) -> dict[str, int]:
    """Files of 4 rows: two small columns, one large, one small."""
    rng = np.random.default_rng(0)
    for number in range(files):
        columns = {"a": range(4), "b": [f"{number}-{i}" for i in range(4)]}
        columns |= {"large": [rng.bytes(LARGE) for _ in range(4)], "last": [number] * 4}
        table = pa.table(columns).replace_schema_metadata({"of": str(number)})
        storage.write_table(f"{base}/f{number:02d}.parquet", table, row_group_size=4 // groups)
    return storage.file_sizes(base, ".parquet")


def test_files_come_in_order_with_their_metadata(base: str) -> None:
    files = write(base, 40)
    tables = list(read_columns(files, ["b", "absent", "a"]))
    assert [table["b"].to_pylist() for table in tables] == [[f"{n}-{i}" for i in range(4)] for n in range(40)]
    assert tables[3].column_names == ["b", "a"]
    assert [table.schema.metadata[b"of"] for table in tables] == [str(n).encode() for n in range(40)]
    footers = list(read_footers(files))
    assert [(footer.num_rows, footer.metadata[b"of"]) for footer in footers] == [
        (4, str(n).encode()) for n in range(40)
    ]
    uri, size_bytes = next(iter(files.items()))
    assert open_parquet(uri).read() == open_parquet(uri, size_bytes).read() == storage.read_table(uri)


def test_a_footer_is_one_request_and_neighbouring_columns_another(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as requests:
        files = write(s3, 6)
        requests.clear()
        assert storage.file_sizes(s3, ".parquet") == files
        assert 0 < requests.total() <= 3
        requests.clear()
        list(read_footers(files))
        assert requests == {"GET": 6}
        requests.clear()
        list(read_columns(files, ["a", "b"]))
        assert requests == {"GET": 12}
        requests.clear()
        list(read_columns(files, ["last"]))  # lies so near to the footer that it came with it
        assert requests == {"GET": 6}
        files = write(s3, 6, groups=2)
        requests.clear()
        list(read_columns(files, ["a", "b"]))
        assert requests == {"GET": 18}


def test_what_cannot_be_read_is_raised(base: str) -> None:
    files = write(base, 3)
    storage.write_bytes(f"{base}/f01.parquet", b"no parquet")
    with pytest.raises(pa.ArrowInvalid):
        list(read_columns(files | {f"{base}/f01.parquet": 10}, ["a"]))
