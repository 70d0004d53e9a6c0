"""Paints pictures by a sound, with the promoted bundle or the one that --bundle names.

    aai generate --audio dog.wav
    aai generate --audio dog.wav --prompt "a sketch of <sound>" --num-images 4
    aai generate --audio dog=dog.wav --audio rain=rain.wav --prompt "a photo of <dog> and <rain*0.6>"
    aai generate --audio dog.wav --audio rain.wav --strip morph
    aai generate --audio dog.wav --refine runs/demo/features
    aai generate --manifest sounds/ --out s3://bucket/pictures

In a prompt <sound> stands for the sound, or of several sounds the <NAME> of each.
"""

import argparse

from pipelines.painting.batch import paint_manifest
from pipelines.painting.paint import add_paint_flags, paint
from pipelines.painting.request import GenerateConfig

CONFIG = GenerateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--strip", metavar="KIND", help="morph, strength or loudness: one seed, a sound that changes")
    parser.add_argument("--refine", metavar="DIR", help="FeatureTable whose pictures A* is tuned on first (AudioCue)")
    parser.add_argument("--control", metavar="FILE", help="the picture that guides addons.controlnet")
    parser.add_argument("--manifest", metavar="FILE", help="many sounds, on Ray: a CSV, Parquet file, tar or folder")
    return {
        **add_paint_flags(parser),
        "strip": "strip",
        "control": "control",
        "refine": "cue.features",
        "manifest": "manifest",
    }


def run(config: GenerateConfig) -> dict[str, object]:
    """Paints and writes PNG files; returns their paths, or the figures of a manifest's."""
    return paint_manifest(config) if config.manifest else paint("generate", config)
