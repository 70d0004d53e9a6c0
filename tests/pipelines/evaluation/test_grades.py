"""The figures from tables written by hand, so that each is known."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from aai import grading, metrics, storage
from aai.disturbances import DISTURBANCES
from aai.foundation.identity import TOY_WEIGHTS
from aai.toy.grammar import OBJECTS
from pipelines.evaluation import grades
from pipelines.evaluation.cases import PICTURE_TABLE
from pipelines.evaluation.clips import EvaluatedClips
from pipelines.evaluation.grades import Heard
from pipelines.evaluation.judges import ATTRIBUTES
from pipelines.evaluation.listening import DISTURBED_TABLE, FRAME_TABLE, HEARD_TABLE, INPUT_TABLE, TEXT_TABLE

LABELS = [
    ["dog", "rain", "photo", "big"],
    ["bell", "night", "sketch", "small"],
    ["dog", "night", "photo", "small"],
    ["car", "rain", "photo", "big"],
]
RMS_DB = np.array([-40.0, -10.0, -30.0, -20.0])


def unit(seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


AUDIO, IMAGE, TEXT = unit(0), unit(1), unit(2)


@pytest.fixture
def out(tmp_path: Path) -> str:
    """heard/ in two files that are not in order, one of training clips beside them."""
    rows = [
        {"row": i, "caption": "", "audio": AUDIO[i], "image": IMAGE[i], "text": TEXT[i], "rms_db": RMS_DB[i],
         "alone_max_abs": (0.25, None, 0.5, None)[i]}
        for i in range(4)
    ]  # fmt: skip
    train = {**rows[0], "row": 0, "rms_db": 0.0, "alone_max_abs": 9.0}
    for name, part in (
        ("test-00000", [rows[3], rows[1]]),
        ("test-00001", [rows[0], rows[2]]),
        ("train-00000", [train]),
    ):
        storage.write_table(f"{tmp_path}/heard/{name}.parquet", pa.Table.from_pylist(part, schema=HEARD_TABLE))
    return str(tmp_path)


def clips(labels: list[list[str]]) -> EvaluatedClips:
    test = {
        "clip_id": ["a", "b", "c", "d"], "content_hash": ["1", "2", "3", "4"], "caption": ["x", "y", "x", "z"],
        "labels": labels,
    }  # fmt: skip
    return EvaluatedClips(
        pa.table(test, pa.schema([(n, pa.string()) for n in list(test)[:3]] + [("labels", pa.list_(pa.string()))])),
        pa.table({"clip_id": ["a"], "content_hash": ["4"]}),
    )


def test_what_was_heard_comes_in_order_of_rows(out: str) -> None:
    heard = Heard(out)
    np.testing.assert_allclose(heard.audio, AUDIO)
    np.testing.assert_allclose(heard.image, IMAGE)
    np.testing.assert_allclose(heard.text, TEXT)
    assert heard.rms_db.tolist() == RMS_DB.tolist()
    assert heard.batch_invariance_max_abs == 0.5


def test_retrieval_in_four_directions(out: str) -> None:
    found = grades.retrieval_figures(clips(LABELS), Heard(out))
    objects = np.array([row[0] for row in LABELS])
    captions = np.array(["x", "y", "x", "z"])
    assert found == {
        "gallery": 4,
        "overlap": 2,
        "batch_invariance_max_abs": 0.5,
        "same_object_r1": (objects[(AUDIO @ IMAGE.T).argmax(1)] == objects).mean(),
        "same_object_by_caption": (objects[(TEXT @ IMAGE.T).argmax(1)] == objects).mean(),
        "same_object_chance": pytest.approx(0.5**2 + 0.25**2 + 0.25**2),
        "oracle": {name: metrics.label_oracle(range(4)) for name in ("captions", "all")},
        "own_above_same_label": metrics.own_above_same_label(AUDIO, IMAGE, objects),
        "a2v": metrics.retrieval(AUDIO, IMAGE),
        "v2a": metrics.retrieval(IMAGE, AUDIO),
        "a2t": metrics.retrieval(AUDIO, TEXT, captions, captions),
        "t2a": metrics.retrieval(TEXT, AUDIO, captions, captions),
    }
    assert grades.retrieval_figures(clips([[]] * 4), Heard(out))["same_object_chance"] == 1


def seen(row: int, obj: str, ambience: str, medium: str = "photo", size: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"row": row, "object": obj, "ambience": ambience, "medium": medium, "size": size, "picture_row": -1, **more}


BY_CONDITION = {
    "sound": [
        seen(0, "dog", "rain", size=0.1),
        seen(1, "bell", "rain", size=0.9),
        seen(3, "car", "night", size=0.5),
        seen(2, "dog", "rain", size=0.3),
    ],
    "caption": [seen(0, "dog", "night", "photo"), seen(1, "dog", "night", "photo")],
    "sketch": [seen(0, "dog", "rain", "sketch"), seen(1, "car", "rain", "photo"), seen(3, "car", "rain", "sketch")],
    # The sound's object is read in 1 of 2; the picture's ambience is kept in 2, its medium in 1.
    "edit": [
        seen(0, "dog", "night", "sketch", picture_row=1),
        seen(1, "dog", "night", "sketch", picture_row=2),
    ],
    # The sound's ambience is read in 2 of 2; the picture's object is kept in 1, its medium in 2.
    "stylize": [
        seen(0, "bell", "rain", "sketch", picture_row=1),
        seen(1, "bell", "night", "photo", picture_row=3),
    ],
    "loudness": [seen(0, "dog", "rain", size=0.7)],
}


def test_a_judge_to_whom_all_are_of_one_size_ends_no_evaluation() -> None:
    same = {**BY_CONDITION, "sound": [{**row, "size": 0.5} for row in BY_CONDITION["sound"]]}
    found = grades.judge_figures(same, LABELS, RMS_DB, ATTRIBUTES)
    assert "loudness_size_spearman" not in found
    assert found["sound"] == grades.judge_figures(BY_CONDITION, LABELS, RMS_DB, ATTRIBUTES)["sound"]


def test_what_the_judge_read_against_the_labels() -> None:
    found = grades.judge_figures(BY_CONDITION, LABELS, RMS_DB, ATTRIBUTES)
    assert found == {
        "chance": {"object": 0.5, "ambience": 0.5, "medium": 0.75},  # of the commonest value
        "foundation": {"caption_object": 0.5, "caption_ambience": 0.5, "caption_medium": 0.5, "caption_pictures": 2},
        "sound": {"object": 1.0, "ambience": 0.25},
        "sketch": {"object": pytest.approx(2 / 3), "ambience": pytest.approx(2 / 3), "medium": pytest.approx(2 / 3)},
        "edit": {"object": 0.5, "kept": 0.5, "kept_ambience": 1.0, "kept_medium": 0.5},
        "stylize": {"ambience": 1.0, "kept": 0.5, "kept_object": 0.5, "kept_medium": 1.0},
        "loudness_size_spearman": pytest.approx(1.0),
    }


WORLD = [
    ["dog", "rain", "photo", "big", "red", "two", "arch", "none", "seen"],
    ["bell", "rain", "photo", "big", "blue", "one", "open", "dog", "pair"],
    ["dog", "rain", "photo", "big", "green", "two", "arch", "none", "values"],
    ["car", "night", "photo", "small", "red", "one", "open", "bell", "timbre"],
]


def read(row: int, **more: str) -> dict[str, Any]:
    """What a judge reads where all is right but what is given."""
    return {"row": row, "picture_row": -1, **dict(zip(ATTRIBUTES, WORLD[row], strict=False)), "size": 0.5 + row, **more}


def test_what_no_caption_names_and_what_no_training_clip_has() -> None:
    sound = [read(0), read(2, colour="red", count="one"), read(1, object="dog", second="bell"), read(3, second="none")]
    named = [read(0, colour="green"), read(1, second="none")]
    by_condition = {"sound": sound, "nearest_caption": named, "full_caption": [read(0), read(1)]}
    found = grades.judge_figures(by_condition, WORLD, RMS_DB, ATTRIBUTES)
    above = found["uncaptioned"].pop("above_nearest_caption")
    assert above["pairs"] == 1  # clip 0 alone has pictures of both, of one object
    assert above["difference"] == pytest.approx(1 / 3)
    assert above["low"] == above["ci95"][0]
    assert found["uncaptioned"] == {  # of pictures of one object
        "colour": {"sound": 0.5, "nearest_caption": 0.0, "ceiling": 1.0, "chance": 0.5},
        "count": {"sound": 0.5, "nearest_caption": 1.0, "ceiling": 1.0, "chance": 1.0},  # both have two
        "place": {"sound": 1.0, "nearest_caption": 1.0, "ceiling": 1.0, "chance": 1.0},
    }
    assert found["two_objects"] == {"sound": 0.5, "nearest_caption": 0.0, "ceiling": 1.0}
    right = {"object": 1.0, "ambience": 1.0, "colour": 1.0, "count": 1.0, "place": 1.0, "pictures": 1}
    assert found["unseen"] == {"seen": right, "values": {**right, "colour": 0.0, "count": 0.0}}, "of one object alone"
    assert found["sound"] == {"object": 1.0, "ambience": 1.0, "colour": 0.75, "count": 0.75, "place": 1.0}
    old = grades.judge_figures({"sound": BY_CONDITION["sound"]}, LABELS, RMS_DB, ATTRIBUTES)
    assert old.keys() == {"chance", "sound", "loudness_size_spearman"}, "tables of the first edition"


def test_the_oracles_know_what_can_be_heard(out: str) -> None:
    found = grades.retrieval_figures(clips(WORLD), Heard(out))["oracle"]
    assert found["captions"] == {"r1": 0.75, "r5": 1.0, "r10": 1.0}, "two of four sound alike by what captions name"
    assert found["all"] == {"r1": 1.0, "r5": 1.0, "r10": 1.0}


def test_a_judge_of_objects_alone_grades_objects_alone() -> None:
    found = grades.judge_figures(
        {name: BY_CONDITION[name] for name in ("sound", "caption", "edit")}, LABELS, RMS_DB, ("object",)
    )
    assert found == {
        "chance": {"object": 0.5},
        "foundation": {"caption_object": 0.5, "caption_pictures": 2},
        "sound": {"object": 1.0},
        "edit": {"object": 0.5},
    }
    assert grades._chance([{}], ("object",)) == {}
    two = [
        {"object": "dog", "second": "bell"},
        {"object": "bell", "second": "car"},
        {"object": "frog", "second": "none"},
    ]
    assert grades._chance(two, ("object",)) == {"object": pytest.approx(2 / 3)}, "of two objects either is right"


def test_scores_of_every_condition_that_fills_one_prompt(out: str) -> None:
    names = ["bell", "car", "dog"]
    texts = F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), dim=-1)
    said = ["a photo of a car", "a photo of a dog", "a photo of a bell", "something else"]
    rows = [{"text": text, "feature": feature} for text, feature in zip(said, texts.tolist(), strict=True)]
    storage.write_table(f"{out}/texts/test-00000.parquet", pa.Table.from_pylist(rows, schema=TEXT_TABLE))
    features = F.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(6)), dim=-1)
    of = [3, 1, 0, 2, 0]
    painted = [{"row": row, "clip_feature": x} for row, x in zip(of, features.tolist(), strict=True)]
    by_condition = {"loudness": painted, "sound": painted, "edit": painted, "stylize": painted, "ceiling": painted[:2]}
    heard = Heard(out)
    found = grades.clip_figures(by_condition, LABELS, heard, out)
    assert found.keys() == {"sound", "ceiling"}
    audio, image = torch.from_numpy(AUDIO), torch.from_numpy(IMAGE)
    classes = texts[[2, 0, 1]]
    wanted = [names.index(LABELS[row][0]) for row in of]
    assert found["sound"] == pytest.approx({
        "aic": grading.zero_shot(features, classes, wanted),
        "ais": grading.similarity_rank(features, audio[of], audio),
        "iis": grading.similarity_rank(features, image[of], image),
        "clip_mmd": grading.clip_mmd(features, image),
    })  # fmt: skip
    some = grades.clip_figures({"sound": painted}, [[], ["bell"], ["dog"], ["car"]], heard, out)
    known = [i for i, row in enumerate(of) if row != 0]
    assert some["sound"]["aic"] == grading.zero_shot(
        features[known], classes, [wanted[i] if i != 0 else 1 for i in known]
    )
    none = grades.clip_figures({"sound": painted}, [[]] * 4, heard, out)
    assert none["sound"].keys() == {"ais", "iis", "clip_mmd"}
    assert grades.class_names([["dog"], [], ["bell", "rain"], ["dog"]]) == ["bell", "dog"]


FRAMES = []
for _level in range(4):  # other colours, and a bar at another place
    _pixels = np.full((64, 64, 3), 60 * _level, np.uint8)
    _pixels[:, 4 + 16 * _level : 8 + 16 * _level] = 255
    FRAMES.append(Image.fromarray(_pixels))


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def write_inputs(out: str) -> None:
    """The frame of each clip, in two files."""
    rows = [{"row": i, "frame": png(frame)} for i, frame in enumerate(FRAMES)]
    for name, part in (("test-00000", rows[2:]), ("test-00001", rows[:2])):
        storage.write_table(f"{out}/inputs/{name}.parquet", pa.Table.from_pylist(part, schema=INPUT_TABLE))


def test_what_is_kept_of_given_pictures_and_what_is_painted_from_noise(out: str) -> None:
    """Edits that return the given pictures, and pictures from noise that are another one each."""
    write_inputs(out)
    scenes = [["dog", "rain", "photo", "big"]] * 3 + [["frog", "snow", "photo", "big"]]  # the last one is heard
    labels = [[*row, *["x"] * 5, "0 0 50 100"] for row in scenes]
    rows: list[dict[str, Any]] = []
    for name, picked in (
        ("edit", [0, 1, 2]),
        ("edit_from_noise", [1, 0, 1]),
        ("stylize", [0, 1, 2]),
        ("stylize_from_noise", [1, 0, 1]),
    ):
        for own, shown in zip((0, 1, 2), picked, strict=True):
            seen = {"object": "dog", "ambience": "rain", "medium": "photo", "size": 0.5}
            picture = {"picture_row": own, "row": 3, "audio_row": 3, "seed": 0, "png": png(FRAMES[shown])}
            rows.append({"case": len(rows), "condition": name, "clip_feature": IMAGE[own], **seen, **picture})
    storage.write_table(f"{out}/pictures/0.parquet", pa.Table.from_pylist(rows, schema=PICTURE_TABLE))
    texts = [{"text": f"a photo of a {name}", "feature": [1.0, 0, 0, 0, 0, 0]} for name in ("dog", "frog")]
    storage.write_table(f"{out}/texts/test-00000.parquet", pa.Table.from_pylist(texts, schema=TEXT_TABLE))
    found = grades.picture_figures(out, clips(labels), Heard(out), ())
    assert found["edit"]["given_nearer"] == 1
    assert found["edit"]["outside_distance"] == 0
    noise = found["edit"]["from_noise"]
    assert noise["pictures"] == 3
    assert noise["given_nearer"] < 0.5, "each is another one of the three"
    assert "edit_from_noise" not in found
    assert found["stylize"]["given_nearer"] == 1
    assert found["stylize"]["from_noise"]["given_nearer"] < 0.5
    assert found["stylize"].keys() == {"pictures", "given_nearer", "from_noise"}
    changed = storage.read_table(f"{out}/pictures/0.parquet").to_pylist()
    for row in changed:  # edits: the given colours and another's bar; styles: the given bar on another's colour
        own, other = (np.asarray(FRAMES[at]) for at in (row["picture_row"], (row["picture_row"] + 1) % 3))
        ground, bar = (own, other) if row["condition"] == "edit" else (other, own)
        row["png"] = png(Image.fromarray(np.where(bar == 255, 255, ground[0, 0]).astype(np.uint8)))
    storage.write_table(f"{out}/pictures/0.parquet", pa.Table.from_pylist(changed, schema=PICTURE_TABLE))
    found = grades.picture_figures(out, clips(labels), Heard(out), ())
    assert found["edit"]["given_nearer"] == 1, "by colours"
    assert found["stylize"]["given_nearer"] == found["stylize"]["from_noise"]["given_nearer"] == 1, "by contours"
    bare = grades.picture_figures(out, clips([row[:4] for row in labels]), Heard(out), ())
    assert "outside_distance" not in bare["edit"]


def test_all_figures_of_the_painted_pictures(out: str) -> None:
    write_inputs(out)
    rows = []
    for name, group in BY_CONDITION.items():
        for row in group:
            picture = png(FRAMES[max(0, row.get("picture_row", 0))])
            own = {"case": len(rows), "condition": name, "clip_feature": IMAGE[row["row"]], "png": picture}
            rows.append({**row, **own})
    halves = (rows[9:], rows[:9])
    for at, part in enumerate(halves):
        table = pa.Table.from_pylist(part, schema=PICTURE_TABLE)
        storage.write_table(f"{out}/pictures/{at}.parquet", table)
    texts = [{"text": f"a photo of a {name}", "feature": [1.0, 0, 0, 0, 0, 0]} for name in ("bell", "car", "dog")]
    storage.write_table(f"{out}/texts/test-00000.parquet", pa.Table.from_pylist(texts, schema=TEXT_TABLE))
    found = grades.picture_figures(out, clips(LABELS), Heard(out), ATTRIBUTES)
    judged = grades.judge_figures(BY_CONDITION, LABELS, RMS_DB, ATTRIBUTES)
    assert found["pictures"] == len(rows)
    assert found["sound"] == {"pictures": 4, **judged["sound"]}
    kept = {name: value for name, value in found["edit"].items() if name not in ("given_nearer", "outside_distance")}
    assert kept == {"pictures": 2, **judged["edit"]}
    assert found["foundation"] == judged["foundation"]
    assert found["loudness_size_spearman"] == judged["loudness_size_spearman"]
    assert found["clip"].keys() == {"sound", "caption", "sketch"}
    assert "loudness" not in found
    assert "caption" not in found
    blind = grades.picture_figures(out, clips(LABELS), Heard(out), ())
    assert {name for name in blind if isinstance(blind[name], dict)} == {"clip", "sound", "sketch", "edit", "stylize"}
    assert blind["sound"] == {"pictures": 4}


def test_judge_and_clip_on_true_frames(out: str) -> None:
    at = {name: OBJECTS.index(name) for name in ("dog", "bell", "car")}
    rows = [
        {"row": 0, "frame": 0, "object": "dog", "clip_class": at["dog"]},
        {"row": 1, "frame": 2, "object": "bell", "clip_class": at["car"]},
        {"row": 2, "frame": 1, "object": "car", "clip_class": at["bell"]},
        {"row": 3, "frame": 1, "object": "car", "clip_class": at["dog"]},
    ]
    storage.write_table(f"{out}/frames/test-00000.parquet", pa.Table.from_pylist(rows, schema=FRAME_TABLE))
    bytes_ = sum(file.stat().st_size for file in TOY_WEIGHTS.rglob("*.safetensors"))
    assert grades.foundation_figures(out, LABELS) == {
        "frames": 4,
        "judge_object": 0.75,
        "clip_object": 0.25,
        "weights_mb": bytes_ / 1e6,
    }


def test_retrieval_by_worse_recordings(out: str) -> None:
    labels, heard = clips(LABELS), Heard(out)
    assert grades.robustness_figures(out, labels, heard) == {}
    rows = []
    for kind, levels in DISTURBANCES.items():
        for level in levels:
            for row in (2, 0):  # at the mildest level as the pictures themselves, then as another clip's
                vector = IMAGE[row] if level == levels[0] else IMAGE[1]
                rows.append({"row": row, "kind": kind, "level": level, "audio": vector})
    for number, part in enumerate((rows[:5], rows[5:], [])):
        table = pa.Table.from_pylist(part, schema=DISTURBED_TABLE)
        storage.write_table(f"{out}/disturbed/test-{number:05d}.parquet", table)
    found = grades.robustness_figures(out, labels, heard)
    assert found["clips"] == 2
    nearest = (AUDIO[[0, 2]] @ IMAGE.T).argmax(1)
    assert found["clean"]["same_object_r1"] == np.mean([LABELS[i][0] == "dog" for i in nearest])
    for kind, levels in DISTURBANCES.items():
        assert list(found[kind]) == [f"{level:g}" for level in levels]
        shares = [found[kind][f"{level:g}"]["same_object_r1"] for level in levels]
        assert shares == [1.0] + [0.0] * (len(levels) - 1)
        assert found[kind][f"{levels[0]:g}"]["a2v_r10"] == 1.0
