"""Trains the small foundation models: a CLIP, a latent diffusion model around its text tower, and the judge.

Reads any manifest of captioned pictures or clips (uri, caption); where there is none yet, the toy world draws one. The
judge always trains on the toy world's own scenes. Each model goes to OUT/NAME in Hugging Face layout (fp16
safetensors); a model that is already there is kept, one that was interrupted goes on.
"""

import argparse
import io
import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from aai import storage
from aai.errors import UserError
from aai.media.decode import ClipError, DecodeConfig, decode_clip
from aai.media.still import eight_bit
from aai.toy import writer
from aai.toy.draw import draw_scene
from aai.toy.grammar import random_scene
from aai.toy.judge import HEADS, SIZE_PX, train_judge
from aai.toy.recipe_clip import FoundationConfig, remove_checkpoints, train_clip
from aai.toy.recipe_diffusion import train_diffusion
from pipelines.engine.lock import locked
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import read_manifest
from pipelines.settings import Plan, VerbConfig

log = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class FoundationVerbConfig(VerbConfig):
    """Settings of `aai foundation`."""

    manifest: str = "${run_dir}/captioned/manifest.csv"
    """Captioned pictures or clips; written by the toy world when absent."""
    out: str = "${run_dir}/weights"
    """Local folder of the models."""
    images: int = pydantic.Field(40000, ge=100)
    """Pictures to draw when the manifest is absent."""
    judge_images: int = pydantic.Field(30000, ge=100)
    seed: int = pydantic.Field(7, ge=0)
    """Of the drawn pictures."""
    models: tuple[Literal["clip", "diffusion", "lcm", "judge"], ...] = ("clip", "diffusion", "lcm", "judge")
    recipe: FoundationConfig = FoundationConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        outputs = {name: storage.join(self.out, name) for name in self.models}
        return Plan(
            inputs={"manifest": self.manifest}, outputs=outputs, resources={"device": "this machine's CPU or GPU"}
        )


CONFIG = FoundationVerbConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--manifest", metavar="FILE", help="captioned pictures or clips")
    parser.add_argument("--out", metavar="DIR", help="folder of the models")
    return {"manifest": "manifest", "out": "out"}


@locked
def run(config: FoundationVerbConfig) -> dict[str, Any]:
    """Trains what is not there yet; returns the seconds each model took."""
    if not storage.exists(config.manifest):
        folder = config.manifest.rsplit("/", 1)[0]
        log.info("foundation: no manifest at %s; the toy world draws %d pictures", config.manifest, config.images)
        writer.write_images(folder, config.images, config.seed)
    out = Path(storage.absolute(config.out))
    check_few_steps(config, out)
    seconds: dict[str, Any] = {}
    if set(config.models) - {"judge"}:
        pixels, captions = load_pictures(config.manifest, config.recipe.image_size_px)
    for name in config.models:
        if (out / name / "finished").exists():
            log.info("foundation: %s is there -> %s", name, out / name)
            continue
        start = time.monotonic()
        if name == "clip":
            train_clip(config.recipe, pixels, captions, out / "clip")
        elif name == "diffusion":
            train_diffusion(config.recipe, pixels, captions, out / "clip", out / "diffusion")
        elif name == "lcm":
            from aai.toy.recipe_consistency import train_consistency  # needs peft, the others do not

            train_consistency(config.recipe, pixels, captions, out / "diffusion", out / "lcm")
        else:
            train_judge(
                draw_labelled(config.judge_images, config.seed + 1),
                config.recipe.judge.fit(config.recipe.seed),
                out / "judge",
            )
        seconds[name] = round(time.monotonic() - start, 1)
        (out / name / "finished").touch()
        remove_checkpoints(out / name)
    size_mb = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    log.info("foundation: %s in %s s, %.1f MB -> %s", ", ".join(config.models), seconds, size_mb, out)
    return {"seconds": seconds, "weights_mb": size_mb}


def check_few_steps(config: FoundationVerbConfig, out: Path) -> None:
    """Raises UserError where the LoRA for few steps could not be trained: told before hours of other models."""
    if "lcm" not in config.models:
        return
    if find_spec("peft") is None:
        raise UserError("models", "lcm", "needs the package peft", "pip install 'aai[lora]', or leave lcm out")
    before = config.models[: config.models.index("lcm")]
    if "diffusion" not in before and not (out / "diffusion" / "finished").exists():
        raise UserError(
            "models", "lcm", f"distills {out / 'diffusion'}, which is not there", "name diffusion before it"
        )


def load_pictures(manifest: str, size_px: int) -> tuple[Tensor, list[str]]:
    """All captioned pictures of a manifest as uint8 [N, size, size, 3], and their captions.

    A clip gives its middle frame. Raises UserError when one cannot be read.
    """
    rows = [row for row in read_manifest(manifest) if row.caption]
    if not rows:
        raise UserError("manifest", manifest, "has no captions", "add a caption column")
    pixels = np.empty((len(rows), size_px, size_px, 3), np.uint8)
    for i, row in enumerate(tqdm(rows, desc="pictures", unit="pic", mininterval=1.0)):
        try:
            picture = _picture(row, size_px)
        except (OSError, ClipError) as error:
            raise UserError("manifest", row.uri, f"cannot be read ({error})", "remove the row") from error
        pixels[i] = np.asarray(picture.resize((size_px, size_px), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels), [row.caption for row in rows]


def _picture(row: ManifestRow, size_px: int) -> Image.Image:
    data = storage.read_bytes(row.uri)
    if row.uri.lower().endswith(PICTURES):
        return eight_bit(Image.open(io.BytesIO(data))).convert("RGB")
    clip = decode_clip(data, row.start_s, row.end_s, DecodeConfig(num_frames=1, frame_size_px=size_px))
    return Image.fromarray(clip.frames[0])


def draw_labelled(count: int, seed: int) -> dict[str, Tensor]:
    """Drawn scenes for the judge: pixels uint8 [N, 64, 64, 3], an int [N] for each head, size float [N]."""
    pixels = np.empty((count, SIZE_PX, SIZE_PX, 3), np.uint8)
    scenes = []
    rng = np.random.default_rng(seed)
    for i in tqdm(range(count), desc="judge scenes", unit="pic", mininterval=1.0):
        scenes.append(random_scene(rng))
        picture = draw_scene(scenes[-1], 128, time_s=float(rng.uniform(0, 10)), level=float(rng.random()))
        pixels[i] = np.asarray(picture.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC))
    named = [scene.attributes for scene in scenes]
    labels = {head: torch.tensor([words.index(row[head]) for row in named]) for head, words in HEADS.items()}
    sizes = torch.tensor([scene.size for scene in scenes], dtype=torch.float32)
    return {"pixels": torch.from_numpy(pixels), **labels, "size": sizes}
