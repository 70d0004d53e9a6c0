import wave
from pathlib import Path

import numpy as np
import pytest

from aai.media.limits import ClipError
from aai.media.waveform import encode_flac, encode_wav, read_samples, read_sound, sound_rate_hz, write_wav

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("length", [1, 4608, 32_000])
def test_flac_is_exact_to_16_bits(length: int) -> None:
    audio = RNG.uniform(-1, 0.9999, length).astype(np.float32)
    back = read_sound(encode_flac(audio, 16_000))
    assert back.shape == (length,)
    assert back.dtype == np.float32
    assert np.abs(back - audio).max() <= 0.5 / 32_768 + 1e-7
    assert np.array_equal(read_sound(encode_flac(back, 16_000)), back)  # a second trip changes nothing


def test_too_loud_samples_are_clipped_not_wrapped() -> None:
    back = read_sound(encode_flac(np.array([1.5, -1.5, 1.0], np.float32), 16_000))
    assert back == pytest.approx([1, -1, 1], abs=1e-4)


def test_an_empty_signal_is_an_error() -> None:
    with pytest.raises(ValueError, match="S > 0"):
        encode_flac(np.zeros(0, np.float32), 16_000)


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100, 48_000, 96_000])
def test_a_flac_tells_its_rate(rate_hz: int) -> None:
    assert sound_rate_hz(encode_flac(np.zeros(100, np.float32), rate_hz)) == rate_hz


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 48_000])
def test_a_wav_holds_the_samples_of_its_flac(rate_hz: int) -> None:
    flac = encode_flac(RNG.uniform(-1, 0.9999, 3_000).astype(np.float32), rate_hz)
    samples = read_samples(flac)
    assert samples.dtype == np.int16
    sound = encode_wav(samples, rate_hz)
    assert len(sound) == 44 + 6_000
    assert sound_rate_hz(sound) == rate_hz
    assert np.array_equal(read_samples(sound), samples)
    assert np.array_equal(read_sound(sound), read_sound(flac))


@pytest.mark.parametrize("data", [b"", b"fLaC", b"RIFF" + bytes(40), b"RIFF\x10\0\0\0WAVE"])
def test_another_file_has_no_rate(data: bytes) -> None:
    with pytest.raises(ValueError, match="neither FLAC nor WAV"):
        sound_rate_hz(data)
    with pytest.raises((ValueError, ClipError), match=r"neither FLAC nor WAV|UNREADABLE"):
        read_samples(data)


def test_a_wav_that_is_cut_off_is_no_shorter_sound() -> None:
    sound = encode_wav(np.arange(1000, dtype=np.int16), 16_000)
    with pytest.raises(ValueError, match="cut off: 500 of 1000"):
        read_samples(sound[:-1000])


def test_only_wavs_as_the_tables_hold_them_are_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(400))
    with pytest.raises(ValueError, match="one channel and 16 bits"):
        read_sound((tmp_path / "stereo.wav").read_bytes())


def test_write_wav(tmp_path: Path) -> None:
    audio = RNG.uniform(-0.5, 0.5, 1000).astype(np.float32)
    write_wav(str(tmp_path / "a.wav"), audio, 22_050)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (22_050, 1, 1000)
        samples = np.frombuffer(file.readframes(1000), np.int16)
    assert samples / 32_768 == pytest.approx(audio, abs=1e-4)
