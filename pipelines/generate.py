"""Sound -> pictures.

aai generate --audio dog.wav
aai generate --audio dog.wav --prompt "a sketch of <sound>" --num-images 4
"""

import argparse

from pipelines.painting.paint import PaintConfig, add_paint_flags, paint

CONFIG = PaintConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    return add_paint_flags(parser)


def run(config: PaintConfig) -> dict[str, object]:
    """Paints and writes PNG files; returns their paths."""
    return paint("generate", config)
