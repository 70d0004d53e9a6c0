"""Which pictures are painted, of which clips, and what their worker writes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aai import storage
from aai.addons import AddOns
from aai.bundle import BundleConfig, read_bundle
from aai.conditions import Conditions, HeldOutClip
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.toy.judge import ToyJudge
from pipelines.evaluation.cases import (
    Case,
    PictureWorker,
    _audio,
    check_conditions,
    loudness_cases,
    make_cases,
    picture_shards,
)
from pipelines.evaluation.clips import ListenShard, find_clips, listen_shards
from pipelines.evaluation.judges import JudgeConfig
from pipelines.evaluation.listening import ListenWorker
from tests.pipelines.evaluation.conftest import clip, frame, sound, write_tables

LABELS = [["dog", "rain"], ["bell", "rain"], ["dog", "night"], ["car", "rain"], ["bell", "night"]]
WORDS = {"objects": ["a dog", "a bell"], "ambiences": ["at night", "in the rain"]}
NONE, TOY = JudgeConfig(model="none"), JudgeConfig()


def config(vocabulary: dict[str, Any] | None = WORDS) -> BundleConfig:
    return BundleConfig(foundation=FoundationSpec(), encoder={}, vocabulary=vocabulary)


def toy(*rows: tuple[str, ...]) -> list[list[str]]:
    return [[*row, *("dog", "rain", "photo", "big")[len(row) :]] for row in rows]


EVERY = {"sound": 1, "caption": 2, "sketch": 1, "edit": 1, "stylize": 3}


@pytest.mark.parametrize(
    ("pictures", "labels", "judge", "words"),
    [
        (EVERY, toy(("dog", "rain"), ("bell", "night")), TOY, WORDS),
        ({"sound": 1}, [[], []], NONE, None),
        ({"sound": 1}, toy(("dog",)), TOY, None),
        ({"sound": 1}, [["dog", "rain", "photo"]], TOY, WORDS),  # the size is not asked of labels
    ],
)
def test_conditions_that_yield_a_figure_pass(
    pictures: dict[str, int], labels: list[list[str]], judge: JudgeConfig, words: dict[str, Any] | None
) -> None:
    refused = None
    try:
        check_conditions(pictures, labels, judge, config(words))
    except UserError as error:
        refused = str(error)
    assert refused is None


@pytest.mark.parametrize(
    ("pictures", "labels", "judge", "words", "message"),
    [
        ({"sound": 1}, [["dog", "rain"], ["dog"]], TOY, WORDS, "object, ambience, medium, but clips have 1 labels"),
        ({"sound": 1}, toy(("dog",), ("elk",), ("ant",)), TOY, WORDS, r"does not know 'ant' \(2 of 3 labels\)"),
        ({"sonud": 7}, toy(("dog",)), TOY, WORDS, r"pictures\.sonud=7: no such condition; one of caption, .*stylize"),
        ({"sketch": 7}, LABELS, NONE, WORDS, r"pictures\.sketch=7: is graded by the medium"),
        ({"edit": 7}, LABELS, NONE, WORDS, r"pictures\.edit=7: is graded by the object"),
        ({"stylize": 7}, LABELS, NONE, WORDS, r"pictures\.stylize=7: is graded by the ambience"),
        ({"edit": 7}, toy(("dog",), ("dog", "night")), TOY, WORDS, r"differ in label 1; found 1 values"),
        ({"stylize": 7}, toy(("dog",), ("bell",)), TOY, WORDS, r"differ in label 2; found 1 values"),
        ({"edit": 7}, toy(("dog",), ("bell",)), TOY, None, r"pictures\.edit=7: needs the bundle's vocabulary"),
    ],
)
def test_conditions_without_a_figure_are_refused(
    pictures: dict[str, int], labels: list[list[str]], judge: JudgeConfig, words: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_conditions(pictures, labels, judge, config(words))


def test_a_sketch_is_not_asked_of_a_bundle_whose_heads_name_no_medium() -> None:
    bundle = config().model_copy(update={"head_pattern": "^the noise of"})
    with pytest.raises(UserError, match=r"pictures\.sketch=7: asks for 'a sketch of <sound>', a head that"):
        check_conditions({"sketch": 7}, toy(("dog",)), TOY, bundle)
    check_conditions({"sound": 7}, toy(("dog",)), TOY, bundle)


def test_cases_go_round_the_clips_with_seeds_of_their_own() -> None:
    counts = {"sound": 7, "shuffled_audio": 5, "edit": 40, "stylize": 40}
    cases = make_cases(LABELS, counts, seed=3)
    assert cases == make_cases(LABELS, counts, seed=3) != make_cases(LABELS, counts, seed=4)
    assert [case.case for case in cases] == list(range(92))
    by_name: dict[str, list[Case]] = {}
    for case in cases:
        by_name.setdefault(case.condition, []).append(case)
    assert {name: len(group) for name, group in by_name.items()} == counts
    order = np.random.default_rng(3).permutation(5).tolist()
    for group in by_name.values():
        assert [case.seed for case in group] == list(range(3_000_000, 3_000_000 + len(group)))
        assert [case.row for case in group] == [order[i % 5] for i in range(len(group))]
    assert [(c.audio_row, c.picture_row) for c in by_name["sound"]] == [(c.row, -1) for c in by_name["sound"]]
    assert [case.audio_row for case in by_name["shuffled_audio"]] == [order[(i + 2) % 5] for i in range(5)]
    for name, place in (("edit", 0), ("stylize", 1)):
        assert all(case.audio_row == case.row for case in by_name[name])
        pairs = {(case.row, case.picture_row) for case in by_name[name]}
        differ = {(a, b) for a in range(5) for b in range(5) if LABELS[a][place] != LABELS[b][place]}
        assert pairs <= differ
        assert len(pairs) > 0.7 * len(differ)
    assert make_cases(LABELS, {"sound": 2}) == make_cases(LABELS, {"sound": 2}, seed=0)
    noise = [{case.seed for case in make_cases(LABELS, {"sound": 50}, seed)} for seed in (0, 1)]
    assert not noise[0] & noise[1], "no picture of another evaluation again"


def test_what_is_painted_from_noise_is_told_of_the_pictures_that_are_changed() -> None:
    counts = {"sound": 3, "edit": 20, "stylize": 20, "edit_from_noise": 12, "stylize_from_noise": 12}
    given: dict[str, list[tuple[int, int]]] = {}
    for case in make_cases(LABELS, counts):
        given.setdefault(case.condition, []).append((case.row, case.picture_row))
    for verb in ("edit", "stylize"):
        assert given[f"{verb}_from_noise"] == given[verb][:12]


def test_the_loudness_series_paints_one_sound_at_several_gains() -> None:
    assert loudness_cases([4, 1], [-6.0, 6.0], first=10) == [
        Case(10, "loudness", 4, 4, 7, -1, -6.0),
        Case(11, "loudness", 4, 4, 7, -1, 6.0),
        Case(12, "loudness", 1, 1, 7, -1, -6.0),
        Case(13, "loudness", 1, 1, 7, -1, 6.0),
    ]
    flac = clip(3)["audio"]
    np.testing.assert_allclose(_audio(flac, 0.0), sound(3), atol=2e-5)
    np.testing.assert_allclose(_audio(flac, 20.0), np.clip(10 * sound(3), -1, 1), atol=4e-4)
    np.testing.assert_allclose(_audio(flac, -20.0), sound(3) / 10, atol=2e-5)
    assert (np.abs(_audio(flac, 60.0)).max(), _audio(flac, 60.0).dtype) == (1, np.float32)


def test_a_case_needs_its_own_clip_the_heard_one_and_the_given_one() -> None:
    assert Case(0, "sound", 3, 3, 0).rows == {3}
    assert Case(0, "shuffled_audio", 3, 0, 0).rows == {0, 3}
    assert Case(0, "edit", 3, 3, 0, 5).rows == {3, 5}


@pytest.fixture(scope="module")
def out(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which nine clips of test (numbers 0, 1, 2, 4, ... 10) and three of train were heard."""
    root = tmp_path_factory.mktemp("cases")
    features, clips = write_tables(root, [list(range(6)), list(range(6, 12))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.clips.MIN_CLIPS", 9)
        shards: list[ListenShard] = listen_shards(find_clips(features, clips, "test", 100), 100, [], set(range(9)))
    worker = ListenWorker(bundle, str(root / "out"), {"model": "none"}, "cpu", 0)
    for shard in shards:
        worker(shard)
    return str(root / "out")


NUMBERS = [0, 1, 2, 4, 5, 6, 8, 9, 10]
"""Of the clips, by row."""


def test_shards_are_of_one_condition_and_know_where_their_clips_lie(out: str) -> None:
    cases = [
        Case(0, "sound", 8, 8, 0),
        Case(1, "edit", 0, 0, 0, 7),
        Case(2, "sound", 1, 1, 1),
        Case(3, "sound", 0, 0, 2),
        Case(4, "edit", 2, 2, 1, 0),
    ]
    shards = picture_shards(cases, 2, out)
    assert [(shard.name, shard.rows, [case.case for case in shard.cases]) for shard in shards] == [
        ("sound-00000", 2, [0, 2]),
        ("sound-00002", 1, [3]),
        ("edit-00000", 2, [1, 4]),
    ]
    for shard in shards:
        found = [row for file, places in shard.inputs.items() for row in storage.read_rows(file, places).to_pylist()]
        assert sorted(row["row"] for row in found) == sorted(set().union(*(case.rows for case in shard.cases)))
    assert len(shards[0].inputs) == 2


@pytest.fixture(scope="module")
def worker(out: str, bundle: str) -> PictureWorker:
    return PictureWorker(bundle, out, {}, {"steps": 2, "negative_prompt": "a clock"}, {}, "cpu", "float32")


CASE = Case(5, "sound", 2, 2, 9)


def painted(worker: PictureWorker, out: str, cases: list[Case]) -> list[dict[str, Any]]:
    (shard,) = picture_shards(cases, 10, out)
    assert worker(shard).rows == len(cases)
    return storage.read_table(str(Path(out, "pictures", f"{shard.name}.parquet"))).to_pylist()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.int16)


def test_pictures_are_painted_by_their_own_sound_and_seed(out: str, bundle: str, worker: PictureWorker) -> None:
    rows = painted(worker, out, [Case(5, "sound", 2, 2, 9), Case(6, "sound", 8, 8, 4)])
    painter = Painter.load(bundle)
    request = PaintRequest(steps=2, negative_prompt="a clock")
    for row, number, seed in zip(rows, (2, 10), (9, 4), strict=True):
        embeds = painter.embed(sound(number), painter.prompt)
        expected = painter.paint(embeds, [seed], request)[0]
        assert np.abs(pixels(Image.open(io.BytesIO(row["png"]))) - pixels(expected)).max() <= 1
    assert [(row["case"], row["row"], row["seed"], row["gain_db"]) for row in rows] == [(5, 2, 9, 0), (6, 8, 4, 0)]


def test_pictures_are_painted_with_what_is_loaded_on_top(out: str, bundle: str) -> None:
    addons = {"scheduler": "ddim"}
    (row,) = painted(PictureWorker(bundle, out, {}, {"steps": 3}, addons, "cpu", "float32"), out, [CASE])
    painter = Painter.load(bundle, addons=AddOns(**addons))
    expected = painter.paint(painter.embed(sound(2), painter.prompt), [9], PaintRequest(steps=3))[0]
    picture = pixels(Image.open(io.BytesIO(row["png"])))
    assert np.abs(picture - pixels(expected)).max() <= 1
    plain = painted(PictureWorker(bundle, out, {}, {"steps": 3}, {}, "cpu", "float32"), out, [CASE])[0]
    assert np.abs(picture - pixels(Image.open(io.BytesIO(plain["png"])))).max() > 1


def test_the_worker_writes_what_judge_and_clip_see(out: str, bundle: str, worker: PictureWorker) -> None:
    rows = painted(worker, out, [Case(0, "ceiling", 0, 0, 0), Case(1, "ceiling", 3, 3, 1)])
    pictures = [Image.open(io.BytesIO(row["png"])) for row in rows]
    for row, seen in zip(rows, ToyJudge.load().read(pictures), strict=True):
        assert {name: row[name] for name in ("object", "ambience", "medium")} == {
            name: seen[name] for name in ("object", "ambience", "medium")
        }
        assert row["size"] == pytest.approx(seen["size"], abs=1e-4)
    features = FrozenClip(read_bundle(bundle).config.foundation).images(pictures)
    np.testing.assert_allclose([row["clip_feature"] for row in rows], features, atol=1e-4)
    blind = PictureWorker(bundle, out, {"model": "none"}, {"steps": 2}, {}, "cpu", "float32")
    assert painted(blind, out, [Case(0, "caption", 0, 0, 0)])[0]["object"] is None


def test_other_conditions_are_those_of_the_training_clips(out: str, bundle: str, worker: PictureWorker) -> None:
    painter = Painter.load(bundle)
    train = [clip(number) for number in (3, 7, 11)]
    mean = torch.cat([painter.listen(sound(number)) for number in (3, 7, 11)]).mean(0)
    frozen = FrozenClip(read_bundle(bundle).config.foundation)
    expected = Conditions(painter, frozen, [held["caption"] for held in train], mean)
    assert worker.conditions.captions == expected.captions
    torch.testing.assert_close(worker.conditions.audio_mean, mean, atol=1e-4, rtol=1e-3)
    rows = painted(worker, out, [Case(0, "closed_form", 4, 4, 3)])
    embeds = expected.embed("closed_form", [HeldOutClip(sound(NUMBERS[4]), "", 3)])
    picture = painter.paint(embeds, [3], worker.request)[0]
    assert np.abs(pixels(Image.open(io.BytesIO(rows[0]["png"]))) - pixels(picture)).mean() < 1


@pytest.mark.parametrize("condition", ["edit", "stylize"])
def test_a_given_picture_is_repainted(out: str, bundle: str, worker: PictureWorker, condition: str) -> None:
    row = painted(worker, out, [Case(0, condition, 1, 1, 5, picture_row=7)])[0]
    assert row["picture_row"] == 7
    painter = Painter.load(bundle)
    given = Image.open(io.BytesIO(frame(NUMBERS[7], 0.5))).convert("RGB")
    request = PaintRequest(steps=2, negative_prompt="a clock", seed=5)
    expected = getattr(painter, condition)(sound(NUMBERS[1]), given, request)[0]
    assert np.abs(pixels(Image.open(io.BytesIO(row["png"]))) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_from_noise_is_told_what_the_picture_shows_and_never_sees_it(
    out: str, bundle: str, worker: PictureWorker, verb: str
) -> None:
    row = painted(worker, out, [Case(0, f"{verb}_from_noise", 1, 1, 5, picture_row=7)])[0]
    painter = Painter.load(bundle)
    given = Image.open(io.BytesIO(frame(NUMBERS[7], 0.5))).convert("RGB")
    target, _ = painter.embed_repaint(verb, [sound(NUMBERS[1])], [given])
    expected = painter.paint(target, [5], worker.request)[0]
    assert np.abs(pixels(Image.open(io.BytesIO(row["png"]))) - pixels(expected)).max() <= 1


def test_loudness_is_the_sound_at_a_gain(out: str, bundle: str, worker: PictureWorker) -> None:
    rows = painted(worker, out, loudness_cases([0], [0.0, 12.0], 0))
    painter = Painter.load(bundle)
    for row, gain in zip(rows, (1.0, 10**0.6), strict=True):
        embeds = painter.embed((gain * sound(0)).astype(np.float32), painter.prompt)
        expected = painter.paint(embeds, [7], worker.request)[0]
        assert np.abs(pixels(Image.open(io.BytesIO(row["png"]))) - pixels(expected)).max() <= 1
    assert rows[0]["png"] != rows[1]["png"]


def test_a_shuffled_clip_is_heard_by_another_and_captioned_by_itself(out: str, worker: PictureWorker) -> None:
    shuffled = painted(worker, out, [Case(0, "shuffled_audio", 1, 5, 2)])[0]
    own = painted(worker, out, [Case(0, "sound", 5, 5, 2)])[0]
    assert shuffled["png"] == own["png"]
    plain = painted(worker, out, [Case(0, "caption", 1, 5, 2)])[0]
    assert plain["png"] == painted(worker, out, [Case(0, "caption", 1, 1, 2)])[0]["png"]
    assert plain["png"] != painted(worker, out, [Case(0, "caption", 5, 5, 2)])[0]["png"]
