"""Evaluate on a small world: its figures, its output folder, what it refuses, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from aai import metrics, storage
from aai.addons import AddOns
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, load_aligner
from aai.errors import UserError
from aai.features import FeatureManifest
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import read_samples
from aai.sampling import PaintRequest
from aai.toy.grammar import OBJECTS
from pipelines import evaluate, featurize
from pipelines.evaluate import EvaluateConfig
from pipelines.evaluation.paired import read_marks
from pipelines.featurize import FeaturizeConfig
from pipelines.registry import evaluations, tracking
from tests import tiny
from tests.pipelines.conftest import run_here

COUNTS = {
    "caption": 2, "sound": 5, "ceiling": 3, "nearest_caption": 2, "closed_form": 2, "shuffled_audio": 2,
    "random_token": 2, "sketch": 2, "edit": 3, "stylize": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """clips, features and bundle of a small world with 12 held-out clips in two files."""
    root = tmp_path_factory.mktemp("evaluate")
    clip = tiny.write_clip(root / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(root / "diffusion", clip)))
    clips = tiny.write_clip_table(root / "accepted", 2, 12, splits_in_turn=("train", "test"))
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        settings = {"input": str(clips), "out": str(root / "features"), "foundation": spec.model_dump()}
        featurize.run(FeaturizeConfig.parse(settings))
    bundle = tiny.write_bundle_of(root / "bundle", spec)
    return {"clips": str(clips), "features": str(root / "features"), "bundle": str(bundle)}


@pytest.fixture
def config(world: dict[str, str], tmp_path: Path, shards_here: None) -> EvaluateConfig:
    return settings(world, tmp_path)


def settings(world: dict[str, str], folder: Path, **changed: Any) -> EvaluateConfig:
    values = {
        **world, "out": str(folder / "out"), "pictures": COUNTS, "request": {"steps": 2}, "cases_per_shard": 2,
        "clips_per_shard": 4, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}, **changed,
    }  # fmt: skip
    return EvaluateConfig.parse(values)


def content(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_figures_are_those_of_the_clips(config: EvaluateConfig, world: dict[str, str]) -> None:
    result = evaluate.run(config)
    assert result == json.loads(Path(config.out, "evaluate.json").read_text())
    clips = storage.read_table(world["features"]).sort_by("clip_id").to_pylist()
    test = [row for row in clips if row["split"] == "test"]
    bundle = read_bundle(world["bundle"])
    audio = embed_files(load_aligner(bundle), [row["audio"] for row in test])
    image = np.array([row["image_features"] for row in test], np.float32).reshape(12, 2, 32).mean(1)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    retrieval = result["retrieval"]
    assert (retrieval["gallery"], retrieval["overlap"]) == (12, 0)
    expected = metrics.retrieval(audio, image, draws=0)
    assert {name: retrieval["a2v"][name] for name in expected} == pytest.approx(expected)
    assert retrieval["batch_invariance_max_abs"] < 1e-5
    objects = np.array([row["labels"][0] for row in test])
    assert retrieval["same_object_r1"] == (objects[(audio @ image.T).argmax(1)] == objects).mean()
    assert retrieval["robustness"]["clips"] == 12
    assert retrieval["robustness"]["clean"]["same_object_r1"] == retrieval["same_object_r1"]
    generation = result["generation"]
    assert {name: generation[name]["pictures"] for name in COUNTS if name != "caption"} == {
        name: count for name, count in COUNTS.items() if name != "caption"
    }
    assert set(generation["clip"]) == set(COUNTS) - {"edit", "stylize"}
    assert set(generation["edit"]) == {"pictures", "object", "kept", "kept_ambience", "kept_medium"}
    assert set(result["foundation"]) == {
        "caption_object", "caption_ambience", "caption_medium", "caption_pictures", "frames", "judge_object",
        "clip_object", "weights_mb",
    }  # fmt: skip
    assert result["foundation"]["frames"] == 24
    assert result["foundation"]["judge_object"] > 0.9  # the judge is trained, whatever the CLIP


def test_a_bundle_against_itself_differs_in_nothing(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluate.run(config)
    assert evaluate.run(config.model_copy(update={"against": config.out})) == first
    file = Path(config.out, f"against-{first['bundle']}.json")
    found = json.loads(file.read_text())
    assert found["figures"]["generation.sound.object"]["difference"] == 0
    assert "retrieval.a2v.r1" in capsys.readouterr().out
    file.unlink()


def records(config: EvaluateConfig) -> int:
    """Runs of this folder's evaluation."""
    client = tracking.connect(config.tracking)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    sha = json.loads(Path(config.out, "evaluate.json").read_text())["sha"]
    return len(client.search_runs([experiment.experiment_id], f"tags.evaluation = '{sha}'"))


def test_an_evaluation_is_put_on_record_once(config: EvaluateConfig) -> None:
    result = evaluate.run(config)
    marks = Path(config.out, "marks.parquet").read_bytes()
    found = evaluations.find(config.tracking, {"bundle": result["bundle"], "settings": result["config"]})
    assert found is not None
    assert (found.figures, found.marks) == (result, marks)
    right = read_marks(marks).filter(pc.field("figure") == "generation.sound.object")["value"].to_pylist()
    assert np.mean(right) == pytest.approx(result["generation"]["sound"]["object"])
    evaluate.run(config)
    assert records(config) == 1


def test_a_result_that_is_not_as_it_was_written_is_taken_anew_from_the_pictures(config: EvaluateConfig) -> None:
    honest = evaluate.run(config)
    file, painted = Path(config.out, "evaluate.json"), content(f"{config.out}/pictures")
    invented = {**honest, "generation": {**honest["generation"], "sound": {"object": 1.0}}}
    old = {name: value for name, value in honest.items() if name not in ("sha", "marks")}
    marks = Path(config.out, "marks.parquet").read_bytes()
    for result in (invented, evaluations.sealed(invented, marks), old):
        file.write_text(json.dumps(result))
        assert {**evaluate.run(config), "seconds": 0} == {**honest, "seconds": 0}
    Path(config.out, "marks.parquet").unlink()
    assert evaluate.run(config)["sha"] == honest["sha"]
    assert records(config) == 1
    # Another store: it is put on record there too.
    elsewhere = config.tracking.model_copy(update={"uri": f"{config.tracking.uri}2"})
    other = config.model_copy(update={"tracking": elsewhere})
    assert evaluate.run(other)["sha"] == honest["sha"]
    assert (records(other), records(config)) == (1, 1)
    assert content(f"{config.out}/pictures") == painted


def test_pictures_are_of_the_clips_they_name(config: EvaluateConfig, world: dict[str, str]) -> None:
    evaluate.run(config)
    clips = [row for row in storage.read_table(world["clips"]).sort_by("clip_id").to_pylist() if row["split"] == "test"]
    inputs = {row["row"]: row for row in storage.read_table(f"{config.out}/inputs").to_pylist()}
    pictures = storage.read_table(f"{config.out}/pictures").to_pylist()
    assert {row["row"] for row in pictures} | {row["audio_row"] for row in pictures} <= set(inputs)
    for row, clip in inputs.items():
        assert clip["clip_id"] == clips[row]["clip_id"]
        assert np.array_equal(read_samples(clip["audio"]), read_samples(clips[row]["audio"]))
        assert clip["frame"] == clips[row]["frames"][1]
    for case in pictures:
        if case["condition"] == "edit":
            assert clips[case["picture_row"]]["labels"][0] != clips[case["audio_row"]]["labels"][0]
        if case["condition"] == "shuffled_audio":
            assert case["audio_row"] != case["row"]


def test_only_what_is_missing_is_made_again(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate.run(config)
    planned = storage.read_json(f"{config.out}/_started.json")["planned"]
    assert (planned["clips"], planned["pictures"]) == (first["retrieval"]["gallery"], first["generation"]["pictures"])
    before = content(config.out)
    assert evaluate.run(config) == first
    moved = {"num_workers": 5, "address": None}
    assert evaluate.run(config.model_copy(update={"cluster": config.cluster.model_copy(update=moved)})) == first
    gone = ["evaluate.json", "heard/test-00001.parquet", "pictures/edit-00000.parquet"]
    for name in gone:
        Path(config.out, name).unlink()
    kept = {name: Path(config.out, name).stat().st_mtime_ns for name in before if name not in gone}
    again = evaluate.run(config)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert {name: data for name, data in content(config.out).items() if name != "evaluate.json"} == {
        name: data for name, data in before.items() if name != "evaluate.json"
    }
    rewritten = {name for name, time in kept.items() if Path(config.out, name).stat().st_mtime_ns != time}
    beside = {f"{name}/test-00001.parquet" for name in ("inputs", "frames", "disturbed")}
    assert rewritten <= {"_started.json", "marks.parquet", *beside}


@pytest.mark.parametrize("foreign", ["thesis.tex", "pictures/holiday.png", "inputs/a.csv", "evaluate.json"])
def test_a_foreign_folder_survives_byte_for_byte(config: EvaluateConfig, foreign: str) -> None:
    out = Path(config.out)
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("{}")
    before = content(out)
    with pytest.raises(UserError, match="nor written by evaluate"):
        evaluate.run(config)
    assert content(out) == before


@pytest.mark.parametrize(
    "changed",
    [{"split": "train"}, {"request": {"steps": 3}}, {"max_clips": 11}, {"judge": "none", "pictures": {"sound": 2}}],
)
def test_another_evaluation_is_never_written_over(
    config: EvaluateConfig, world: dict[str, str], tmp_path: Path, changed: dict[str, Any]
) -> None:
    storage.write_json(f"{config.out}/_started.json", {"config": "0", "bundle": "0", "data_fingerprint": "0"})
    storage.write_json(f"{config.out}/pictures/sound-00000.parquet", "earlier")
    before = content(config.out)
    with pytest.raises(UserError, match="holds the evaluation of another"):
        evaluate.run(settings(world, tmp_path, **changed))
    assert content(config.out) == before
    assert settings(world, tmp_path, **changed).content_digest() != config.content_digest()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "nosuch"}, r"split=nosuch: has 0 clips .*there: test, train"),
        ({"pictures": {"sonud": 3}}, "pictures.sonud=3: no such condition"),
        ({"pictures": {"sketch": 3}, "judge": "none"}, "pictures.sketch=3: is graded by the medium"),
        ({"pictures": {"edit": 3}, "judge": "none"}, "pictures.edit=3: is graded by the object"),
        ({"judge": "/nowhere/model"}, "judge.model=/nowhere/model: holds no model"),
        ({"addons": {"lora": "/nowhere/lora"}}, "addons.lora=/nowhere/lora: does not exist"),
    ],
)
def test_what_would_yield_no_figure_is_refused_before_anything_is_made(
    config: EvaluateConfig, world: dict[str, str], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.run(settings(world, tmp_path, **changed))
    assert not Path(config.out).exists()


def test_the_bundle_must_hear_the_rate_of_the_features(world: dict[str, str], tmp_path: Path) -> None:
    manifest = FeatureManifest.read(world["features"]).model_copy(update={"sample_rate_hz": 8_000})
    storage.write_json(f"{tmp_path}/features/manifest.json", manifest.model_dump(mode="json"))
    config = settings(world, tmp_path, features=f"{tmp_path}/features")
    with pytest.raises(UserError, match=r"bundle=.*: hears 16000 Hz, the features hold 8000 Hz"):
        evaluate.run(config)
    assert not Path(config.out, "_started.json").exists()


def test_pictures_are_painted_as_requested(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the worker paints by its request is shown in evaluation/test_cases.py."""
    request = {"steps": 3, "guidance_scale": 1.5, "negative_prompt": "a clock", "denoise_strength": 0.5}
    sent = []
    monkeypatch.setattr(evaluate, "run_shards", lambda name, shards, worker, args, *rest, **more: sent.append(args))
    addons = {"scheduler": "ddim"}
    evaluate.paint(settings(world, tmp_path, request=request, addons=addons, dtype="bfloat16", device="cuda"), [])
    evaluate.paint(settings(world, tmp_path, request={}), [])
    asked, usual = sent
    assert PaintRequest.parse(asked["request"]) == PaintRequest(**request)
    assert (asked["dtype"], asked["device"]) == ("bfloat16", "cuda")
    assert (AddOns.parse(asked["addons"]), AddOns.parse(usual["addons"])) == (AddOns(scheduler="ddim"), AddOns())
    assert PaintRequest.parse(usual["request"]) == PaintRequest(steps=10)
    for wrong in ({"seed": 3}, {"prompt": "a <sound>"}, {"num_images": 2}, {"sound_strength": 0.5}):
        with pytest.raises(UserError, match=r"request\.\w+=.*unknown key"):
            settings(world, tmp_path, request=wrong)


def test_what_is_loaded_on_top_is_part_of_what_an_evaluation_is(world: dict[str, str], tmp_path: Path) -> None:
    """By the LoRA's content: the same file elsewhere is the same evaluation. None at all is that of before."""
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)
    asked: tuple[dict[str, Any], ...] = (
        {}, {"scheduler": "model"}, {"scheduler": "ddim"}, {"lora": f"{tmp_path}/a"}, {"lora": f"{tmp_path}/b"},
        {"lora": f"{tmp_path}/c"}, {"lora": f"{tmp_path}/a", "lora_scale": 0.5},
    )  # fmt: skip
    plain, same, ddim, lora, moved, other, weaker = (
        settings(world, tmp_path, addons=addons).content_digest() for addons in asked
    )
    assert plain == same == settings(world, tmp_path).content_digest()
    assert lora == moved
    assert len({plain, ddim, lora, other, weaker}) == 5
    with pytest.raises(UserError, match=r"addons\.controlnet needs a picture that held-out clips do not have"):
        settings(world, tmp_path, addons={"controlnet": "x"})


def test_an_evaluation_of_before_there_were_add_ons_goes_on() -> None:
    """The digest of the defaults says nothing of add-ons; it changes with a default, or with what is read off."""
    assert EvaluateConfig().content_digest() == "8dc5a38997945338"


def test_workers_get_add_ons_by_a_path_that_holds_anywhere(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lora.safetensors").write_bytes(b"1")
    sent: list[dict[str, Any]] = []

    def shards(name: str, shards: object, worker: object, args: dict[str, Any], *rest: object, **more: object) -> None:
        sent.append(args)
        if "addons" in args:
            raise InterruptedError

    monkeypatch.setattr(evaluate, "run_shards", shards)
    monkeypatch.setattr(evaluate, "picture_shards", lambda *args: [])
    with pytest.raises(InterruptedError):
        evaluate.run(settings(world, tmp_path, addons={"lora": "lora.safetensors"}))
    assert sent[-1]["addons"]["lora"] == str(tmp_path / "lora.safetensors")


def test_it_is_told_how_pictures_were_painted(world: dict[str, str], tmp_path: Path, shards_here: None) -> None:
    changed = {"pictures": {"sound": 2}, "disturbed_clips": 0, "judge": "none"}
    figures = evaluate.run(settings(world, tmp_path, addons={"scheduler": "ddim"}, **changed))
    assert (figures["request"]["steps"], figures["addons"]) == (2, {"scheduler": "ddim"})
    with pytest.raises(UserError, match="holds the evaluation of another bundle, other data or other settings"):
        evaluate.run(settings(world, tmp_path, **changed))


def test_clips_without_labels_have_no_judge_but_scores(
    world: dict[str, str], tmp_path: Path, shards_here: None
) -> None:
    features = tmp_path / "features"
    features.mkdir()
    for file in Path(world["features"]).iterdir():
        (features / file.name).write_bytes(file.read_bytes())
    for file in features.glob("*.parquet"):
        table = storage.read_table(str(file))
        at = table.schema.get_field_index("labels")
        empty = table.set_column(at, table.schema.field(at), pa.array([[]] * len(table), pa.list_(pa.string())))
        storage.write_table(str(file), empty)
    with pytest.raises(UserError, match=r"judge.model=toy: reads object, ambience, medium, but clips have 0 labels"):
        evaluate.run(settings(world, tmp_path, features=str(features)))
    quiet = settings(world, tmp_path, features=str(features), judge="none", pictures={"sound": 2, "ceiling": 2})
    scores = evaluate.run(quiet)["generation"]["clip"]["sound"]
    assert set(scores) == {"ais", "iis", "clip_mmd"}


def write_classifier(folder: Path, classes: list[str]) -> Path:
    """A random image classifier of transformers."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes, **labels))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_any_image_classifier_judges(world: dict[str, str], tmp_path: Path, shards_here: None) -> None:
    classes = [f"n{i} {name}" for i, name in enumerate(OBJECTS)]
    judge = {"model": str(write_classifier(tmp_path / "judge", classes))}
    counts = {"sound": 3, "ceiling": 2, "edit": 2}
    with pytest.raises(UserError, match="does not know 'b"):
        evaluate.run(settings(world, tmp_path, judge=judge, pictures=counts))
    judge |= {"names": {name: name.split(" ")[1] for name in classes}}
    result = evaluate.run(settings(world, tmp_path, judge=judge, pictures=counts))
    assert set(result["generation"]["sound"]) == {"pictures", "object"}
    assert set(result["generation"]["edit"]) == {"pictures", "object"}
    assert set(result["generation"]["chance"]) == {"object"}
    read = storage.read_table(f"{tmp_path}/out/pictures")["object"].to_pylist()
    assert set(read) <= set(OBJECTS)
    with pytest.raises(UserError, match=r"judge.names=cat: is no class"):
        evaluate.run(settings(world, tmp_path, judge={**judge, "names": {"cat": "dog"}}, out=str(tmp_path / "x")))


def test_overlap_with_training_is_counted(world: dict[str, str], tmp_path: Path) -> None:
    from pipelines.evaluation.clips import find_clips

    features = tmp_path / "features"
    for file in storage.list_files(world["features"], ".parquet"):
        table = storage.read_table(file)
        at = table.schema.get_field_index("content_hash")
        storage.write_table(
            str(features / Path(file).name), table.set_column(at, table.schema.field(at), [["same"] * len(table)])
        )
    assert find_clips(world["features"], world["clips"], "test", 100).overlap() == 0
    assert find_clips(str(features), world["clips"], "test", 100).overlap() == 12


def test_the_clip_is_the_frozen_one(world: dict[str, str]) -> None:
    """The embeddings that pictures are compared with come from the bundle's own CLIP."""
    assert FrozenClip(read_bundle(world["bundle"]).config.foundation).dim == 32
