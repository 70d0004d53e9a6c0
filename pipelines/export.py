"""A sound's A* as a textual-inversion file, with which diffusers alone paints the same picture.

    aai export --audio dog.wav
    aai export --audio dog=dog.wav --audio rain=rain.wav --out tokens

OUT/NAME.safetensors holds the word <NAME>; in Python, without this package:

    pipe.load_textual_inversion("tokens/dog.safetensors", token="<dog>")
    pipe("a photo of <dog>")

Right behind the words it was learned with, as here: elsewhere in a prompt plain diffusers makes something else of it.
Stable Diffusion XL takes the file's tensors one by one: clip_l into text_encoder, clip_g into text_encoder_2.
"""

import argparse
import logging
from typing import Any

from aai import storage
from aai.bundle import read_bundle
from aai.errors import UserError
from aai.inject import textual_inversion
from aai.painter import Painter
from pipelines.painting.paint import decode_sounds, read_sounds
from pipelines.painting.request import ExportConfig
from pipelines.registry import versions

log = logging.getLogger(__name__)
CONFIG = ExportConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--audio", metavar="FILE", action="append", help="the sound; several: NAME=FILE each")
    parser.add_argument("--bundle", metavar="URI", help="models:/NAME@ALIAS or a bundle folder")
    parser.add_argument("--out", metavar="DIR", help="folder of the files")
    return {"audio": "audio", "bundle": "bundle", "out": "out"}


def run(config: ExportConfig) -> dict[str, Any]:
    """Hears the sounds and writes their files; returns where they are.

    Raises UserError for a file that holds another word: it stays.
    """
    data = read_sounds(config)
    bundle = read_bundle(versions.resolve_bundle(config.bundle, config.tracking))
    sounds = decode_sounds(data, config, bundle)
    painter = Painter.load(bundle)
    made = {}
    for name, sound in sounds.items():
        file = storage.join(config.out, f"{name}.safetensors")
        made[file] = textual_inversion(painter.injector, painter.hear(sound, config.window), name)
        if storage.exists(file) and storage.read_bytes(file) != made[file]:
            rule = "holds the word of another sound or bundle"
            raise UserError("out", file, rule, "delete it, choose another folder, or name the sound NAME=FILE")
    for (file, content), name in zip(made.items(), sounds, strict=True):
        storage.write_bytes(file, content)
        log.info("export: <%s> -> %s (pipe.load_textual_inversion(FILE, token='<%s>'))", name, file, name)
    return {"files": list(made)}
