"""Sound -> pictures.

aai generate --audio dog.wav
aai generate --audio dog.wav --prompt "a sketch of <sound>" --num-images 4
aai generate --audio dog=dog.wav --audio rain=rain.wav --prompt "a photo of <dog> and <rain*0.6>"
aai generate --audio dog.wav --audio rain.wav --strip morph
"""

import argparse

from pipelines.painting.paint import GenerateConfig, add_paint_flags, paint

CONFIG = GenerateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--strip", metavar="KIND", help="morph, strength or loudness: one seed, a sound that changes")
    return {**add_paint_flags(parser), "strip": "strip"}


def run(config: GenerateConfig) -> dict[str, object]:
    """Paints and writes PNG files; returns their paths."""
    return paint("generate", config)
