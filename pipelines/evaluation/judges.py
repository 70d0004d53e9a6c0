"""Who reads pictures beside the CLIP: the toy world's judge, any image classifier of transformers, or nobody."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pydantic
import torch
from PIL import Image

from aai.config import Config
from aai.errors import UserError
from aai.grading import Reading

ATTRIBUTES = ("object", "ambience", "medium", "size", "colour", "count", "place", "second")
"""What a judge may read, in the order of a clip's labels."""
UNCAPTIONED = ("colour", "count", "place")
"""Of the toy world: what can be heard and seen, and no caption of a clip names."""
NOVELTY, REGION = 8, 9
"""Place of the toy world's label that says what of a clip no training clip has."""


class JudgeConfig(Config):
    """The judge of an evaluation."""

    model: str = "toy"
    """toy: the toy world's judge; none: nobody; else a folder or hub id of an image classifier of transformers."""
    revision: str | None = None
    """Commit of the hub id; required for a hub id so that an evaluation can be repeated."""
    names: dict[str, str] = pydantic.Field({})
    """What the classifier calls a thing -> the clips' label for it; classes without an entry keep their name."""
    batch_size: int = pydantic.Field(64, ge=1)
    """Pictures per forward pass."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """What this judge reads off a picture; known without loading it."""
        return {"toy": ATTRIBUTES, "none": ()}.get(self.model, ("object",))


class Judge(Protocol):
    """Reads pictures; a Reading has the attributes of its JudgeConfig."""

    def read(self, images: Sequence[Image.Image]) -> Sequence[Reading]:
        """What is seen in each picture."""


class ClassifierJudge:
    """An image classifier of transformers: the class it finds is the object."""

    def __init__(self, config: JudgeConfig, device: str) -> None:
        """Loads the model. Raises UserError when it is not there, or a hub id is not pinned."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if not os.path.isdir(config.model) and not config.revision:
            raise UserError("judge.revision", "(missing)", f"hub id {config.model} is not pinned", "give its commit")
        kwargs: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        try:
            model = AutoModelForImageClassification.from_pretrained(
                config.model, dtype=torch.float32, use_safetensors=True, **kwargs
            )
            self.processor = AutoImageProcessor.from_pretrained(config.model, **kwargs)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).split("\n")[0][:200]
            rule = f"cannot be loaded as an image classifier ({reason})"
            raise UserError("judge.model", config.model, rule, "give a folder or a reachable hub id") from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.batch_size = device, config.batch_size
        self.classes = class_names(self.model.config.id2label, config.names)

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """{"object": the label of the likeliest class} of each picture."""
        out: list[Reading] = []
        for at in range(0, len(images), self.batch_size):
            pictures = [image.convert("RGB") for image in images[at : at + self.batch_size]]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
            found = self.model(pixel_values=pixels).logits.argmax(-1).tolist()
            out += [{"object": self.classes[index]} for index in found]
        return out


def class_names(id2label: Mapping[int, str], names: Mapping[str, str]) -> dict[int, str]:
    """The clips' label of each class. Raises UserError for an entry of `names` that is no class."""
    unknown = sorted(set(names) - set(id2label.values()))
    if unknown:
        some = ", ".join(list(id2label.values())[:5])
        raise UserError("judge.names", unknown[0], "is no class of the classifier", f"classes are {some}, ...")
    return {index: names.get(label, label) for index, label in id2label.items()}


def known_objects(config: JudgeConfig) -> set[str] | None:
    """The clips' labels that the judge can read as an object; None = it cannot be told. Loads no weights."""
    if config.model == "none":
        return None
    if config.model == "toy":
        from aai.toy.grammar import OBJECTS

        return set(OBJECTS)
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        rule = f"holds no model of transformers ({reason})"
        raise UserError("judge.model", config.model, rule, "give toy, none, or a classifier's folder") from error
    return set(class_names(found.id2label, config.names).values())


def load_judge(config: JudgeConfig, device: str) -> Judge | None:
    """The judge, or None when nobody is to look."""
    if config.model == "none":
        return None
    if config.model == "toy":
        from aai.toy.judge import ToyJudge

        return ToyJudge.load()
    return ClassifierJudge(config, device)
