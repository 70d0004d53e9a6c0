"""What each single clip got: its mean over the clips is the figure of evaluate.json."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from aai.grading import class_prompt
from pipelines.evaluation import grades
from pipelines.evaluation.cases import PICTURE_TABLE
from pipelines.evaluation.grades import Heard
from pipelines.evaluation.judges import ATTRIBUTES
from pipelines.evaluation.listening import HEARD_TABLE, TEXTS
from pipelines.evaluation.marks import marks
from pipelines.registry.figures import figure
from tests.pipelines.evaluation.test_grades import WORLD, clips


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Four clips heard, and pictures of them, some read wrongly."""
    rng = np.random.default_rng(0)
    draw = lambda: (lambda x: (x / np.linalg.norm(x)).tolist())(rng.standard_normal(6))  # noqa: E731
    heard = [
        {
            "row": i,
            "caption": "",
            "audio": draw(),
            "image": draw(),
            "text": draw(),
            "rms_db": float(i),
            "alone_max_abs": 0.0,
        }
        for i in range(4)
    ]
    storage.write_table(f"{tmp_path}/heard/test-0.parquet", pa.Table.from_pylist(heard, schema=HEARD_TABLE))
    classes = [{"text": class_prompt(name), "feature": draw()} for name in sorted({row[0] for row in WORLD})]
    storage.write_table(f"{tmp_path}/{TEXTS}/0.parquet", pa.Table.from_pylist(classes))
    pictures: list[dict[str, Any]] = []
    for condition in ("sound", "nearest_caption", "sketch", "edit", "edit_from_noise", "stylize", "caption"):
        for i in range(4):
            read = {**dict(zip(ATTRIBUTES, WORLD[(i + i // 3) % 4], strict=False)), "size": 0.5 + i}
            given = (i + 1) % 4 if condition.startswith(("edit", "stylize")) else -1
            where = {"case": len(pictures), "condition": condition, "row": i, "audio_row": i, "picture_row": given}
            pictures.append({**read, **where, "seed": i, "gain_db": 0.0, "clip_feature": draw()})
    storage.write_table(f"{tmp_path}/pictures/0.parquet", pa.Table.from_pylist(pictures, schema=PICTURE_TABLE))
    return str(tmp_path)


def test_their_means_are_the_figures(out: str) -> None:
    of, heard = clips(WORLD), Heard(out)
    found = marks(out, of, heard, ATTRIBUTES)
    columns = ["case", "condition", "row", "picture_row", *ATTRIBUTES, "clip_feature"]
    by_condition: dict[str, Any] = {}
    for row in storage.read_table(f"{out}/pictures", columns).sort_by("case").to_pylist():
        by_condition.setdefault(row["condition"], []).append(row)
    generation = grades.judge_figures(by_condition, WORLD, heard.rms_db, ATTRIBUTES)
    generation["clip"] = grades.clip_figures(by_condition, WORLD, heard, out)
    generation["edit"]["from_noise"] = generation.pop("edit_from_noise")
    told = {"retrieval": grades.retrieval_figures(of, heard), "generation": generation}
    means = found.group_by("figure").aggregate([("value", "mean")]).to_pylist()
    for row in means:
        assert row["value_mean"] == pytest.approx(figure(told, row["figure"])), row["figure"]
    names = {row["figure"] for row in means}
    assert {"retrieval.a2v.r1", "retrieval.t2a.r10", "retrieval.same_object_r1", "generation.sound.object"} <= names
    assert {"generation.edit.kept_ambience", "generation.edit.from_noise.object", "generation.clip.sound.aic"} <= names
    assert {"generation.stylize.kept", "generation.edit.from_noise.kept", "generation.sketch.medium"} <= names
    assert not any(name.startswith("generation.caption") for name in names)


def test_what_no_judge_reads_has_no_marks(out: str) -> None:
    names = set(marks(out, clips(WORLD), Heard(out), ())["figure"].to_pylist())
    assert names
    assert all(name.startswith(("retrieval.", "generation.clip.")) for name in names)
