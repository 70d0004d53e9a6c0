"""Who reads pictures, on a small image classifier of random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from aai.errors import UserError
from aai.toy.grammar import OBJECTS
from pipelines.evaluation.judges import ATTRIBUTES, ClassifierJudge, JudgeConfig, class_names, known_objects, load_judge

CLASSES = ["tabby", "collie", "sedan", "finch", "siren", "oboe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(4)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    path = tmp_path_factory.mktemp("judge")
    # Weights far enough from 0 that other pictures are of other classes.
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, initializer_range=1.0, **sizes, **labels))
    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return str(path)


def test_what_a_judge_reads_is_known_without_loading_it() -> None:
    assert JudgeConfig().attributes == ATTRIBUTES
    assert JudgeConfig(model="none").attributes == ()
    assert JudgeConfig(model="/some/folder").attributes == ("object",)
    assert JudgeConfig().batch_size == 64
    JudgeConfig(batch_size=1)
    with pytest.raises(UserError, match="batch_size"):
        JudgeConfig.parse({"batch_size": 0})


def test_the_classifiers_likeliest_class_is_the_object(folder: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(3)]
    pictures += [Image.new("RGB", (50, 50), color) for color in ("red", "blue")] + [Image.new("L", (20, 20), 255)]
    judge = load_judge(JudgeConfig(model=folder, names={"tabby": "cat", "sedan": "car"}, batch_size=4), "cpu")
    assert isinstance(judge, ClassifierJudge)
    model = ViTForImageClassification.from_pretrained(folder)
    pixels = ViTImageProcessorPil.from_pretrained(folder)(
        images=[picture.convert("RGB") for picture in pictures], return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**pixels).logits.argmax(-1).tolist()
    ours = ["cat", "collie", "car", "finch", "siren", "oboe"]
    assert judge.read(pictures) == [{"object": ours[index]} for index in found]
    assert len(set(found)) > 1
    assert judge.read([]) == []


def test_names_must_be_classes() -> None:
    id2label = dict(enumerate(CLASSES))
    assert class_names(id2label, {"oboe": "horn"}) == {**id2label, 5: "horn"}
    with pytest.raises(UserError, match=r"judge.names=drum: .*classes are tabby, collie, sedan, finch, siren, \.\.\."):
        class_names(id2label, {"zither": "x", "drum": "y"})


def test_known_objects(folder: str) -> None:
    assert known_objects(JudgeConfig(model="none")) is None
    assert known_objects(JudgeConfig()) == set(OBJECTS)
    assert known_objects(JudgeConfig(model=folder, names={"tabby": "cat"})) == {*CLASSES[1:], "cat"}
    with pytest.raises(UserError, match=r"judge.model=/no/where: holds no model"):
        known_objects(JudgeConfig(model="/no/where"))


def test_the_judge_of_a_config(folder: str, tmp_path: Path) -> None:
    assert load_judge(JudgeConfig(model="none"), "cpu") is None
    toy = load_judge(JudgeConfig(), "cpu")
    assert toy is not None
    assert toy.read([Image.new("RGB", (64, 64))])[0].keys() == set(ATTRIBUTES)
    with pytest.raises(UserError, match=r"judge.revision=\(missing\): hub id some/model is not pinned"):
        load_judge(JudgeConfig(model="some/model"), "cpu")
    with pytest.raises(UserError, match="cannot be loaded as an image classifier"):
        load_judge(JudgeConfig(model=str(tmp_path)), "cpu")
