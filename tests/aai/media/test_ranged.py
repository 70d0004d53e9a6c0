"""A file that is read by range is the same file: the same bytes, rows and hash."""

import hashlib
import io
import random

import pytest

from aai.media.limits import DecodeConfig
from aai.media.measure import measure_bytes
from aai.media.ranged import PIECE_BYTES, AskedRanges, HashedRanges, hash_of, opened
from aai.media.shots import probe_bytes, probe_to_json
from tests.clips import index_first, make_moving, remuxed


class Counted(AskedRanges):
    """Ranges that keep what they were asked for."""

    def __init__(self, data: bytes) -> None:
        self.asked: list[tuple[int, int]] = []

        def read(start: int, end: int) -> bytes:
            self.asked.append((start, end))
            return data[start:end]

        super().__init__(len(data), read)


def test_ranges_read_like_a_file() -> None:
    data = random.Random(0).randbytes(2 * PIECE_BYTES + 99)
    file, usual = opened(Counted(data)), io.BytesIO(data)
    for offset, whence, size in ((0, 0, 5), (3, 1, PIECE_BYTES), (-7, 2, 99), (len(data) + 5, 0, 1), (1, 0, -1)):
        assert file.seek(offset, whence) == usual.seek(offset, whence)
        assert file.read(size) == usual.read(size)
        assert file.tell() == usual.tell()
    assert opened(b"abc").read() == b"abc"


@pytest.mark.parametrize("container", ["mp4", "index first", "matroska", "mpegts", "avi"])
def test_the_rows_are_those_of_the_file_in_memory(container: str) -> None:
    options = {"g": "20"}
    if container == "avi":
        data = make_moving("mpeg4", container, num_frames=80, options=options, sound="libmp3lame")
    else:
        source = make_moving(num_frames=80, options=options)
        data = index_first(source) if container == "index first" else remuxed(source, container)
    cfg = DecodeConfig()
    for window in ((None, None), (1.5, 2.5), (3.0, None), (9.0, 10.0)):
        ranges = Counted(data)
        row = measure_bytes(ranges, *window, cfg)
        assert row == measure_bytes(data, *window, cfg), window
        assert row["content_hash"] == hashlib.sha256(data).hexdigest()
    found, usual = (probe_bytes(content, None, 60, cfg, 60) for content in (Counted(data), data))
    assert probe_to_json(found) == probe_to_json(usual)


def test_a_hash_that_is_known_is_not_found_anew() -> None:
    data = make_moving(num_frames=20)
    ranges = Counted(data + bytes(4 * PIECE_BYTES))  # which no clip needs
    row = measure_bytes(ranges, None, None, DecodeConfig(), content_hash="known")
    assert (row["code"], row["content_hash"]) == (None, "known")
    assert sum(end - start for start, end in ranges.asked) < len(ranges)


def test_what_passes_in_order_is_hashed_on_the_way() -> None:
    data = random.Random(1).randbytes(3 * PIECE_BYTES + 1)
    index = (3 * PIECE_BYTES, len(data))
    for passed, in_order in (([], 0), ([(0, 10), index, (5, PIECE_BYTES), (2, 3)], PIECE_BYTES), ([(0, 9), index], 9)):
        hashed = HashedRanges(ranges := Counted(data))
        for start, end in passed:
            assert hashed.read(start, end) == data[start:end]
        assert hashed.content_hash() == hashed.content_hash() == hashlib.sha256(data).hexdigest()
        assert sum(end - start for start, end in ranges.asked[len(passed) :]) == len(data) - in_order
    assert hash_of(data) == hash_of(Counted(data)) == hashlib.sha256(data).hexdigest()
    assert hash_of(Counted(b"")) == hash_of(b"")
