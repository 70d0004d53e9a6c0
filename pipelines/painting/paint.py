"""What generate, edit and stylize share: flags, loading sound, picture and bundle, and writing the pictures."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aai import storage
from aai.addons import AddOns
from aai.bundle import Bundle, read_bundle
from aai.cue import refine
from aai.encoders.aligner import encoder_config
from aai.errors import UserError
from aai.inject import Sound
from aai.media.decode import ClipError, decode_audio
from aai.media.still import STILL_FORMATS, decode_still
from aai.painter import Painter
from aai.png import encode_png, hashes, same_picture
from aai.proof import Prover, has_manifest
from aai.sampling import check_repaint
from aai.strips import joined, paint_strip
from pipelines.painting.request import GenerateConfig, PaintConfig, RepaintConfig, SoundsConfig
from pipelines.registry import versions
from pipelines.settings import InputLimits, SoundLimits

log = logging.getLogger(__name__)


def add_paint_flags(parser: argparse.ArgumentParser, with_image: bool = False) -> dict[str, str]:
    """The short flags of the painting verbs and the settings they stand for."""
    help_text = "the sound" if with_image else "the sound; repeat it for several, NAME=FILE is <NAME> in the prompt"
    parser.add_argument("--audio", metavar="FILE", action="append", help=help_text)
    flags = {"audio": "audio", "prompt": "request.prompt", "seed": "request.seed", "out": "out", "bundle": "bundle"}
    if with_image:
        parser.add_argument("--image", metavar="FILE", help="the picture to change")
        parser.add_argument("--mask", metavar="FILE", help="white where it may change, with request.repaint=invert")
        flags |= {"image": "image", "mask": "mask"}
    parser.add_argument("--prompt", metavar="TEXT", help="text with <sound> where the sound belongs")
    parser.add_argument("--seed", metavar="N", help="picture i uses seed N + i")
    parser.add_argument("--num-images", metavar="N", help="how many pictures")
    parser.add_argument("--bundle", metavar="URI", help="models:/NAME@ALIAS or a bundle folder")
    parser.add_argument("--out", metavar="DIR", help="folder of the PNG files")
    return {**flags, "num_images": "request.num_images"}


def decode_sound(uri: str | None, data: bytes, limits: SoundLimits, sample_rate_hz: int) -> np.ndarray:
    """A user's sound as a mono waveform float32 [S]; UserError naming file and rule when it is none."""
    try:
        return decode_audio(data, limits.max_audio_s, limits.max_bytes, sample_rate_hz)
    except ClipError as error:
        raise UserError("audio", uri, f"{error.code}: {error.message}", "give a readable sound file") from error


def read_sounds(config: SoundsConfig) -> dict[str, bytes]:
    """The files of a command's sounds by name. Raises UserError for none, and for one that cannot be read."""
    sources = config.sounds() or {"sound": ""}
    return {name: _read("audio", uri, config.limits.max_bytes) for name, uri in sources.items()}


def decode_sounds(data: dict[str, bytes], config: SoundsConfig, bundle: Bundle) -> dict[str, np.ndarray]:
    """The sounds as waveforms float32 [S] at the rate that the bundle hears."""
    rate_hz, sources = encoder_config(bundle).sample_rate_hz, config.sounds()
    return {name: decode_sound(sources[name], data[name], config.limits, rate_hz) for name in sources}


def decode_picture(data: bytes, uri: str | None, limits: InputLimits, setting: str = "image") -> Image.Image:
    """A user's picture as upright RGB; UserError when it is unreadable or too large."""
    try:
        backdrop = "black" if setting == "mask" else None
        return decode_still(data, limits.max_pixels, (*STILL_FORMATS, "BMP", "GIF"), backdrop)
    except ClipError as error:
        raise UserError(setting, uri, f"{error.code}: {error.message}", "give a PNG, JPEG or WebP file") from error


def _read(setting: str, uri: str | None, max_bytes: int) -> bytes:
    if not uri:
        raise UserError(setting, "(missing)", f"this command needs a file for {setting}", f"pass --{setting} FILE")
    if not storage.exists(uri):
        raise UserError(setting, uri, "no such file", "check the path")
    try:
        return storage.read_bytes(uri, max_bytes)
    except ValueError as error:
        raise UserError(setting, uri, str(error), "give a smaller file or raise limits.max_bytes") from error
    except OSError as error:
        raise UserError(setting, uri, f"cannot be read ({error})", "check the path and its permissions") from error


def paint(verb: str, config: PaintConfig) -> dict[str, object]:
    """Runs generate, edit or stylize and writes the PNG files; returns their paths and the time."""
    if isinstance(config, RepaintConfig):
        check_repaint(config.request)  # before anything is loaded
    if isinstance(config, RepaintConfig) and len(config.sounds()) > 1:
        raise UserError("audio", ", ".join(config.audio), f"{verb} takes one sound", "give one, or use generate")
    data, given, prover = read_sounds(config), _read_pictures(config), Prover(config.proof)
    images = []
    for name, (uri, file) in given.items():
        images.append(None if file is None else decode_picture(file, uri, config.limits, name))
    pinned, name, version, _ = versions.pin_bundle(config.bundle, config.tracking)
    bundle = read_bundle(versions.resolve_bundle(pinned, config.tracking))
    sounds = decode_sounds(data, config, bundle)
    painter = Painter.load(bundle, config.torch_device, config.dtype, config.addons)
    start = time.perf_counter()
    painted = _painted(verb, painter, sounds, images, config)
    seconds = time.perf_counter() - start
    stem = stem_of(*config.sounds().values())
    addons = {"addons": config.addons.model_dump(exclude_unset=True)} if config.addons != AddOns() else {}
    made = {"verb": verb, "audio": stem, "bundle": bundle.sha, **config.request.model_dump(), **addons}
    made |= hashes(data, {name: file for name, (_, file) in given.items() if file})
    if name:
        made["model"] = f"{name}/{version}"
    files = []
    for end, image, how in painted:
        files.append(write_picture(config.out, f"{verb}_{stem}_{end}", image, {**made, **how}, prover))
    made_in = f"{painter.dtype}, {seconds:.1f} s"
    told, shown = ", ".join(config.audio), ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    log.info("%s: %d picture(s) of %s in %s -> %s", verb, len(files), told, made_in, shown)
    return {"files": files, "seconds": seconds, "dtype": painter.dtype}


def _read_pictures(config: PaintConfig) -> dict[str, tuple[str | None, bytes | None]]:
    """URI and content of the given picture and the mask of edit and stylize, or of what guides a ControlNet."""
    given: dict[str, str | None] = {"control": config.control if isinstance(config, GenerateConfig) else None}
    if isinstance(config, RepaintConfig):
        given = {"image": config.image or "", "mask": config.mask}
    limit = config.limits.max_bytes
    return {name: (uri, None if uri is None else _read(name, uri, limit)) for name, uri in given.items()}


Painted = tuple[str, Image.Image, dict[str, Any]]
"""The end of a picture's file name, the picture, and what of its making is its own."""


def _painted(
    verb: str, painter: Painter, sounds: dict[str, np.ndarray], images: list[Image.Image | None], config: PaintConfig
) -> list[Painted]:
    request = config.request
    if isinstance(config, GenerateConfig) and config.strip:
        strip = paint_strip(painter, config.strip, sounds, request, config.strip_pictures)
        made = {"strip": config.strip}
        parts = [(f"{config.strip}{i}", picture, {**made, "at": at}) for i, (at, picture) in enumerate(strip)]
        return [(config.strip, joined(strip), made), *parts]
    if isinstance(config, GenerateConfig) and config.cue.features:
        return _refined(painter, next(iter(sounds.values())), config)
    if verb == "generate":
        pictures = painter.generate(sounds, request, images[0])
    else:
        image, mask = images
        pictures = getattr(painter, verb)(next(iter(sounds.values())), image, request, mask)
    seeds = [request.seed + i for i in range(len(pictures))]
    return [(f"seed{seed}", picture, {"seed": seed}) for seed, picture in zip(seeds, pictures, strict=True)]


def _refined(painter: Painter, sound: np.ndarray, config: GenerateConfig) -> list[Painted]:
    """AudioCue: pictures before and after A* was tuned, of the same seeds."""
    request = config.request
    prompt = request.prompt or painter.prompt
    cue = refine(painter, sound, config.cue, request.seed, request.window)
    near = ", ".join(f"{clip} {cosine:.3f}" for clip, cosine in list(cue.told()["retrieved"].items())[:3])
    log.info("generate: A* tuned in %.1f s on %s, ...; denoising loss %.4f -> %.4f",
             cue.seconds, near, cue.loss_before, cue.loss_after)  # fmt: skip
    seeds = [request.seed + i for i in range(request.num_images)]
    out: list[Painted] = []
    for name, tokens, how in (("", cue.before, {}), ("_refined", cue.after, {"cue": cue.told()})):
        embeds = painter.injector.embed(prompt, {"sound": Sound(tokens, request.sound_strength)})
        pictures = painter.paint(embeds.expand(len(seeds), -1, -1), seeds, request)
        for seed, picture in zip(seeds, pictures, strict=True):
            out.append((f"seed{seed}{name}", picture, {"seed": seed, **how}))
    return out


def stem_of(*uris: str) -> str:
    """The sounds' names as the part of a file name, cut where file systems would refuse it."""
    stem = "+".join(Path(uri).stem.lstrip("-") or "sound" for uri in uris)
    return stem.encode("utf-8", "replace")[:120].decode("utf-8", "ignore")


def write_picture(
    folder: str, name: str, image: Image.Image, made: dict[str, Any], prover: Prover | None = None
) -> str:
    """Writes FOLDER/NAME.png (local or s3://) with `made`, how it was made, as JSON in the PNG text `aai`.

    A picture that was made otherwise is kept: the new one is then NAME_2.png, and so on. One that is there without the
    proof that it now gets is replaced. Returns where it is.
    """
    data, number = (prover.encode(image, made) if prover else encode_png(image, made)), 1
    uri = storage.join(folder, f"{name}.png")
    while storage.exists(uri):
        if same_picture(found := storage.read_bytes(uri), data):
            if has_manifest(data) and not has_manifest(found):
                break
            return uri
        number += 1
        uri = storage.join(folder, f"{name}_{number}.png")
    storage.write_bytes(uri, data)
    return uri
