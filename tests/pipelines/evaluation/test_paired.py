"""Two bundles on the same clips, from tables written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from aai.errors import UserError
from pipelines.evaluation.cases import PICTURE_TABLE
from pipelines.evaluation.listening import HEARD_TABLE, INPUT_TABLE
from pipelines.evaluation.paired import compare, lines

CLIPS = 40
LABELS = [["dog" if i % 2 else "bell", "rain" if i % 4 < 2 else "night", "photo", "big"] for i in range(CLIPS)]
SETTINGS = {"config": "c", "data_fingerprint": "d"}


def write(out: Path, bundle: str, right: float, noise: float, **changes: Any) -> str:
    """An evaluation whose first share `right` of the pictures show their object; noise: of its audio embeddings."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((CLIPS, 8))
    audio = image + noise * rng.standard_normal((CLIPS, 8))
    image, audio = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, audio))
    heard = [
        {"row": i, "caption": "", "audio": audio[i], "image": image[i], "text": image[i], "rms_db": 0.0,
         "alone_max_abs": 0.0}
        for i in range(CLIPS)
    ]  # fmt: skip
    storage.write_table(f"{out}/heard/test-00000.parquet", pa.Table.from_pylist(heard, schema=HEARD_TABLE))
    inputs = [{"row": i, "labels": row} for i, row in enumerate(LABELS)]
    storage.write_table(f"{out}/inputs/test-00000.parquet", pa.Table.from_pylist(inputs, schema=INPUT_TABLE))
    pictures = []
    for condition in ("sound", "edit"):
        for i in range(CLIPS):
            given = (i + 1) % CLIPS if condition == "edit" else -1
            ambience = LABELS[given][1] if condition == "edit" else LABELS[i][1]
            seen = {"object": LABELS[i][0] if i < right * CLIPS else "car", "ambience": ambience, "medium": "photo"}
            own = {"case": len(pictures), "condition": condition, "row": i, "audio_row": i, "picture_row": given}
            pictures.append({**own, "seed": i, "gain_db": 0.0, "size": 0.5, **seen})
    rng.shuffle(pictures)
    storage.write_table(f"{out}/pictures/0.parquet", pa.Table.from_pylist(pictures, schema=PICTURE_TABLE))
    storage.write_json(f"{out}/evaluate.json", {**SETTINGS, "bundle": bundle, **changes})
    return str(out)


def test_the_better_bundle_is_better_beyond_chance(tmp_path: Path) -> None:
    better, worse = write(tmp_path / "a", "aa", 0.9, 0.3), write(tmp_path / "b", "bb", 0.5, 3.0)
    found = compare(better, storage.read_json(f"{better}/evaluate.json"), worse)
    assert found["bundle"] == "bb"
    sound = found["generation"]["sound"]["object"]
    assert sound["difference"] == pytest.approx(0.4)
    assert 0.2 < sound["ci95"][0] < 0.4 < sound["ci95"][1] < 0.6
    assert sound["pairs"] == CLIPS
    assert found["generation"]["sound"]["ambience"] == {"difference": 0, "ci95": [0, 0], "pairs": CLIPS}
    assert found["generation"]["edit"].keys() == {"object", "ambience", "medium"}
    assert found["retrieval"]["a2v_r1"]["ci95"][0] > 0
    back = compare(worse, storage.read_json(f"{worse}/evaluate.json"), better)
    assert back["generation"]["sound"]["object"]["difference"] == pytest.approx(-0.4)
    told = "\n".join(lines(found))
    assert "sound.object         +0.400" in told
    assert "better" in told
    assert "sound.ambience       +0.000  [+0.000, +0.000]  40 pairs  may be chance" in told
    assert "worse" in "\n".join(lines(back))


@pytest.mark.parametrize(
    ("changes", "rule"), [({"config": "other"}, "other settings"), ({"data_fingerprint": "other"}, "other clips")]
)
def test_other_settings_or_clips_cannot_be_compared(tmp_path: Path, changes: dict[str, str], rule: str) -> None:
    ours, theirs = write(tmp_path / "a", "aa", 0.9, 0.3), write(tmp_path / "b", "bb", 0.5, 0.3, **changes)
    with pytest.raises(UserError, match=f"is an evaluation of {rule}"):
        compare(ours, storage.read_json(f"{ours}/evaluate.json"), theirs)
    with pytest.raises(UserError, match="holds no finished evaluation"):
        compare(ours, storage.read_json(f"{ours}/evaluate.json"), str(tmp_path / "absent"))
