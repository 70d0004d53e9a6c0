from pathlib import Path

import numpy as np
import pytest

from aai import storage
from aai.errors import UserError
from aai.schema import NO_PICTURE, STILL_PICTURE, VIDEO_PICTURES
from pipelines.tables.kinds import kinds_in, picture_counts, shared_count, spread
from tests.tiny import of_kinds, write_clip_table

KINDS = (NO_PICTURE, VIDEO_PICTURES, STILL_PICTURE, VIDEO_PICTURES)


def test_the_number_of_a_videos_pictures_counts_where_there_are_other_kinds(tmp_path: Path) -> None:
    kinds = {}
    for name, given in (("videos", [VIDEO_PICTURES]), ("bare", [NO_PICTURE]), ("mixed", KINDS)):
        of_kinds(write_clip_table(tmp_path / name, 1, 4, num_frames=3), given)
        file = f"{tmp_path}/{name}/shard-00000.parquet"
        kinds[name] = {file: kinds_in(storage.read_table(file))}
        assert set(kinds[name][file]) == set(given)
    (plain,) = storage.list_files(str(write_clip_table(tmp_path / "plain", 1, 4, num_frames=3)), ".parquet")
    untold = {plain: kinds_in(storage.read_table(plain))}
    assert shared_count(untold) == shared_count(kinds["videos"]) == 0  # each file tells for itself
    assert shared_count(kinds["bare"]) == 1
    assert shared_count(kinds["bare"] | kinds["mixed"]) == shared_count(kinds["bare"] | kinds["videos"]) == 3
    with pytest.raises(UserError, match=r"input=.*plain.*: has no column picture, as other files have; curate"):
        shared_count(kinds["bare"] | untold)


def test_a_clip_has_as_many_pictures_as_its_kind(tmp_path: Path) -> None:
    (file,) = storage.list_files(of_kinds(write_clip_table(tmp_path / "mixed", 1, 4, num_frames=3), KINDS), ".parquet")
    clips = storage.read_table(file)
    counts, num_frames = picture_counts("f", clips, 3)
    assert (counts.tolist(), num_frames) == ([0, 3, 1, 3], 3)
    for wrong in (2, 0):
        with pytest.raises(UserError, match=r"input=f: clips have \[0, 1, 3\] pictures, not equally many; curate"):
            picture_counts("f", clips, wrong)
    (plain,) = storage.list_files(str(write_clip_table(tmp_path / "plain", 1, 4)), ".parquet")
    counts, num_frames = picture_counts("f", storage.read_table(plain), 0)
    assert (counts.tolist(), num_frames) == ([2] * 4, 2)


def test_a_still_stands_for_all_pictures_and_nothing_for_none() -> None:
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert spread(features, np.array([3, 0, 1]), 3).tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[0, 0]] * 3,
        [[6, 7]] * 3,
    ]
    np.testing.assert_array_equal(spread(features, np.array([2, 2]), 2), features.reshape(2, 2, 2))
    assert spread(features[:0], np.array([0, 0]), 2).tolist() == [[[0, 0]] * 2] * 2
