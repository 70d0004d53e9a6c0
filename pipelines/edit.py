"""Puts a sound's object into a given picture; what the sound does not speak of is kept.

    aai edit --audio dog.wav --image cat.png

The prompt is read off the picture where none is given.
"""

import argparse

from pipelines.painting.paint import add_paint_flags, paint
from pipelines.painting.request import RepaintConfig

CONFIG = RepaintConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    return add_paint_flags(parser, with_image=True)


def run(config: RepaintConfig) -> dict[str, object]:
    """Paints and writes PNG files; returns their paths."""
    return paint("edit", config)
