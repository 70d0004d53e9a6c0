from dataclasses import replace

import numpy as np
import pytest

from aai.media.decode import DecodeConfig, decode_clip
from aai.media.signals import audio_hash, level_db, measure, motion, silent_fraction, video_hash
from aai.schema import SIGNALS
from tests.clips import make_clip

RNG = np.random.default_rng(0)


def bits(left: bytes, right: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(left, right, strict=True))


def test_measures_every_signal_of_the_schema() -> None:
    clip = decode_clip(make_clip(), None, None, DecodeConfig())
    signals = measure(clip, 16_000)
    assert list(signals) == [field.name for field in SIGNALS]
    assert signals["rms_db"] == pytest.approx(-12, abs=0.5)  # a tone of -9 dB, half of the time
    assert signals["silent_fraction"] == pytest.approx(0.5, abs=0.06)
    assert signals["clipped_fraction"] == 0
    assert signals["motion"] == pytest.approx(35 * 0.5, rel=0.15)  # 35 a second, frames 0.5 s apart
    assert len(signals["video_hash"]) == len(signals["audio_hash"]) == 32
    loud = measure(replace(clip, audio=np.clip(clip.audio * 9, -1, 1)), 16_000)
    assert loud["clipped_fraction"] > 0.3


def test_levels() -> None:
    square = np.tile([0.1, -0.1], 8000).astype(np.float32)
    assert level_db(square) == pytest.approx(-20)
    assert level_db(np.zeros(100, np.float32)) == level_db(np.zeros(0, np.float32)) == -120
    assert silent_fraction(np.concatenate([np.zeros(4000, np.float32), square[:12_000]]), 16_000) == 0.25
    assert silent_fraction(np.zeros(10, np.float32), 16_000) == 1


def test_motion_is_the_mean_difference() -> None:
    still = np.full((3, 32, 32), 100, np.uint8)
    assert motion(still) == motion(still[:1]) == 0
    still[1] = 90
    assert motion(still) == 10


def test_audio_hash_keeps_through_gain_and_noise_but_tells_sounds_apart() -> None:
    t = np.arange(32_000) / 16_000
    sounds = [np.sin(2 * np.pi * f * t * (1 + 0.2 * np.sin(g * t))) * 0.3 for f, g in ((300, 3), (700, 5))]
    sounds = [(s + 0.05 * RNG.standard_normal(32_000)).astype(np.float32) for s in sounds]
    first, second = (audio_hash(s, 16_000) for s in sounds)
    assert bits(first, second) > 80
    assert bits(first, audio_hash(sounds[0] * 0.25, 16_000)) <= 2
    noisy = sounds[0] + 0.002 * RNG.standard_normal(32_000).astype(np.float32)
    assert bits(first, audio_hash(noisy, 16_000)) < 40


def test_video_hash_keeps_through_brightness_but_tells_pictures_apart() -> None:
    scenes = [np.kron(RNG.integers(0, 200, (4, 4, 4)), np.ones((8, 8))).astype(np.uint8) for _ in range(2)]
    first, second = (video_hash(scene) for scene in scenes)
    assert bits(first, second) > 80
    assert bits(first, video_hash((scenes[0] * 0.8 + 20).astype(np.uint8))) < 16
