"""Two bundles on the same clips, from marks written by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from aai.errors import UserError
from pipelines.evaluation.paired import MARKS, SCHEMA, as_bytes, compare, lines, paired, read_marks

CLIPS = 40
SETTINGS = {"config": "c", "data_fingerprint": "d"}


def marks(shares: dict[str, float], clips: int = CLIPS) -> pa.Table:
    """The first clips are right, in two pictures each; in another order than their numbers'."""
    rows = []
    for name, share in shares.items():
        for clip in np.random.default_rng(0).permutation(np.repeat(np.arange(clips), 2)):
            rows.append({"figure": name, "clip": clip, "value": float(clip < share * clips)})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write(out: Path, bundle: str, shares: dict[str, float], **changes: str) -> str:
    """A finished evaluation."""
    storage.write_bytes(f"{out}/{MARKS}", as_bytes(marks(shares)))
    storage.write_json(f"{out}/evaluate.json", {**SETTINGS, "bundle": bundle, **changes})
    return str(out)


def test_the_better_bundle_is_better_beyond_chance(tmp_path: Path) -> None:
    better = write(tmp_path / "a", "aa", {"generation.sound.object": 0.9, "retrieval.a2v.r1": 0.5, "ours": 1.0})
    worse = write(tmp_path / "b", "bb", {"generation.sound.object": 0.5, "retrieval.a2v.r1": 0.5})
    found = compare(better, storage.read_json(f"{better}/evaluate.json"), worse)
    assert found["bundle"] == "bb"
    assert found["figures"].keys() == {"generation.sound.object", "retrieval.a2v.r1"}, "what both have"
    sound = found["figures"]["generation.sound.object"]
    assert sound["difference"] == pytest.approx(0.4)
    assert 0.2 < sound["ci95"][0] < 0.4 < sound["ci95"][1] < 0.6
    assert sound["pairs"] == CLIPS, "pictures of one clip are not drawn independently"
    assert found["figures"]["retrieval.a2v.r1"] == {"difference": 0, "ci95": [0, 0], "pairs": CLIPS}
    back = compare(worse, storage.read_json(f"{worse}/evaluate.json"), better)
    assert back["figures"]["generation.sound.object"]["difference"] == pytest.approx(-0.4)
    told = "\n".join(lines(found))
    assert "generation.sound.object                  +0.400" in told
    assert "better" in told
    assert "retrieval.a2v.r1                         +0.000  [+0.000, +0.000]  40 pairs  may be chance" in told
    assert "worse" in "\n".join(lines(back))


def test_marks_of_other_clips_are_no_pairs() -> None:
    ours = marks({"a": 0.5})
    assert paired("a", ours, marks({"a": 0.5}, CLIPS - 1)) is None
    assert paired("a", ours, marks({"b": 0.5})) is None
    assert paired("b", ours, marks({"b": 0.5})) is None
    assert read_marks(as_bytes(ours)).equals(ours)


@pytest.mark.parametrize(
    ("changes", "rule"), [({"config": "other"}, "other settings"), ({"data_fingerprint": "other"}, "other clips")]
)
def test_other_settings_or_clips_cannot_be_compared(tmp_path: Path, changes: dict[str, str], rule: str) -> None:
    ours, theirs = write(tmp_path / "a", "aa", {"a": 0.9}), write(tmp_path / "b", "bb", {"a": 0.5}, **changes)
    with pytest.raises(UserError, match=f"is an evaluation of {rule}"):
        compare(ours, storage.read_json(f"{ours}/evaluate.json"), theirs)
    with pytest.raises(UserError, match="holds no finished evaluation"):
        compare(ours, storage.read_json(f"{ours}/evaluate.json"), str(tmp_path / "absent"))
    Path(theirs, MARKS).unlink()
    with pytest.raises(UserError, match=r"by an older release.*once more: nothing is painted again"):
        compare(ours, storage.read_json(f"{ours}/evaluate.json"), theirs)
