import io
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from aai.media.container import shows_video
from aai.media.decode import ClipError, DecodeConfig, decode_audio, decode_clip, decode_sound
from tests.clips import frame_value, index_first, make_clip, tone

CFG = DecodeConfig()


def brightness(frame: np.ndarray) -> float:
    return float(np.median(frame))


def code_of(data: bytes, cfg: DecodeConfig = CFG, start_s: float | None = None, end_s: float | None = None) -> str:
    with pytest.raises(ClipError) as caught:
        decode_clip(data, start_s, end_s, cfg)
    assert caught.value.message
    return caught.value.code


def test_frames_are_those_on_show_and_sound_is_in_place() -> None:
    clip = decode_clip(make_clip(), None, None, CFG)
    assert clip.frames.shape == (4, 64, 96, 3)
    assert clip.frame_pts_s == pytest.approx([0.2, 0.7, 1.2, 1.7], abs=0.051)
    for frame, pts in zip(clip.frames, clip.frame_pts_s, strict=True):
        assert brightness(frame) == pytest.approx(frame_value(pts), abs=2)
    assert (clip.width, clip.height, clip.fps) == (96, 64, 10)
    assert (clip.source_sample_rate_hz, clip.channels) == (44_100, 2)
    assert clip.duration_s == pytest.approx(2, abs=0.06)
    assert clip.luma.shape == clip.hash_luma.shape == (4, 32, 32)
    expected = tone(2, 16_000)
    assert np.abs(clip.audio[15_000:15_900]).max() < 0.05  # silent until 1 s
    assert np.corrcoef(clip.audio[16_500:31_500], expected[16_500:31_500])[0, 1] > 0.99


@pytest.mark.parametrize(("rate", "layout", "channels"), [(8_000, "mono", 1), (11_025, "mono", 1), (48_000, "5.1", 6)])
def test_any_rate_and_layout_becomes_16_khz_mono(rate: int, layout: str, channels: int) -> None:
    clip = decode_clip(make_clip(sample_rate_hz=rate, layout=layout), None, None, CFG)
    assert (clip.source_sample_rate_hz, clip.channels) == (rate, channels)
    assert clip.audio.dtype == np.float32
    assert clip.audio.ndim == 1
    assert len(clip.audio) == pytest.approx(32_000, abs=2500)
    assert np.corrcoef(clip.audio[16_500:31_500], tone(2, 16_000)[16_500:31_500])[0, 1] > 0.95


def test_variable_frame_rate_goes_by_time() -> None:
    times = [0.0, 0.1, 0.15, 0.9, 1.0, 1.05, 1.8, 1.9]
    clip = decode_clip(make_clip(times), None, None, CFG)
    for target, pts, frame in zip((0.25, 0.75, 1.25, 1.75), clip.frame_pts_s, clip.frames, strict=True):
        shown = max(t for t in times if t <= target + 0.02)
        assert pts == pytest.approx(shown, abs=0.002)
        assert brightness(frame) == pytest.approx(frame_value(shown), abs=2)


def test_streams_that_start_late_give_the_same_clip() -> None:
    plain, late = (decode_clip(make_clip(start_s=s), None, None, CFG) for s in (0.0, 1.5))
    assert late.duration_s == pytest.approx(plain.duration_s, abs=0.06)
    assert late.frame_pts_s == pytest.approx(plain.frame_pts_s, abs=0.06)
    assert np.abs(late.audio[:15_500]).max() < 0.05
    assert np.abs(late.audio[17_500:31_000]).max() > 0.4


def test_window_is_a_part_of_the_whole() -> None:
    data = make_clip(duration_s=6.0)
    part = decode_clip(data, 2.5, 4.5, CFG)
    assert part.audio.shape == (32_000,)
    assert part.duration_s == pytest.approx(2)
    for frame, pts in zip(part.frames, part.frame_pts_s, strict=True):
        assert brightness(frame) == pytest.approx(frame_value(2.5 + pts), abs=2)
    assert np.abs(part.audio[:7_500]).max() < 0.05  # the tone starts at 3 s
    assert np.abs(part.audio[8_500:]).max() > 0.4
    assert code_of(data, start_s=7, end_s=9) == "OUT_OF_RANGE"
    assert code_of(data, start_s=3, end_s=2) == "OUT_OF_RANGE"


def test_file_without_a_declared_length_is_spread_evenly_too() -> None:
    source, sink = io.BytesIO(make_clip()), io.BytesIO()
    with av.open(source, "r") as given, av.open(sink, "w", format="matroska", options={"live": "1"}) as out:
        streams = {s.index: out.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    with av.open(io.BytesIO(sink.getvalue()), "r") as check:
        assert check.duration is None
    clip = decode_clip(sink.getvalue(), None, None, CFG)
    assert clip.frame_pts_s == pytest.approx([0.2, 0.7, 1.2, 1.7], abs=0.06)


def test_bad_files_are_named() -> None:
    whole = index_first(make_clip())
    assert decode_clip(whole, None, None, CFG).duration_s > 1.9
    assert code_of(b"") == "EMPTY_FILE"
    assert code_of(b"not a clip " * 50) == "UNREADABLE"
    assert code_of(make_clip()[:2000]) == "UNREADABLE"  # its index is lost
    assert code_of(whole[: len(whole) * 6 // 10]) == "UNREADABLE"  # a good index, but half the content
    assert code_of(make_clip(has_audio=False)) == "NO_AUDIO"
    assert code_of(make_clip(has_video=False)) == "NO_VIDEO"


def test_limits_hold() -> None:
    data = make_clip()
    for code, cfg in {
        "TOO_LARGE": DecodeConfig(max_bytes=len(data) - 1),
        "TOO_LONG": DecodeConfig(max_duration_s=1.5),
        "TIMEOUT": DecodeConfig(timeout_s=1e-9),
    }.items():
        assert code_of(data, cfg) == code
    assert code_of(data, DecodeConfig(max_pixels=96 * 64 - 1)) == "TOO_LARGE"
    assert code_of(data, DecodeConfig(max_streams=1)) == "TOO_LARGE"
    with pytest.raises(ClipError) as caught:
        decode_clip(data, None, None, DecodeConfig(timeout_s=1e-9))
    assert caught.value.transient


def test_playlists_cannot_name_other_files(tmp_path: object) -> None:
    target = f"{tmp_path}/secret.mp4"
    with open(target, "wb") as file:
        file.write(make_clip())
    assert code_of(f"ffconcat version 1.0\nfile '{target}'\n".encode()) == "UNREADABLE"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{target}\n#EXT-X-ENDLIST\n"
    assert code_of(playlist.encode()) == "UNREADABLE"


def wav(samples: np.ndarray, rate: int) -> bytes:
    sink = io.BytesIO()
    with wave.open(sink, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).astype(np.int16).tobytes())
    return sink.getvalue()


def test_a_part_of_a_sound() -> None:
    """As the whole one cut: the limit is the part's, and a video's part counts from where curation counts."""
    data = wav(tone(8, 16_000), 16_000)
    whole = decode_audio(data, 10, 10**6, 16_000)
    for part_s, cut in (
        ((5.0, 6.5), slice(80_000, 104_000)),
        ((6.0, None), slice(96_000, None)),
        ((None, 1.0), slice(16_000)),
    ):
        assert np.array_equal(decode_audio(data, 3, 10**6, 16_000, part_s=part_s), whole[cut])
    clip = make_clip(duration_s=4.0)
    ours = decode_audio(clip, 10, 10**6, 16_000, part_s=(1.5, 3.0))
    theirs = decode_clip(clip, 1.5, 3.0, DecodeConfig(sample_rate_hz=16_000)).audio
    assert np.abs(ours[:23_000] - theirs[:23_000]).max() < 1e-3
    for part_s, code in (((9.0, 10.0), "OUT_OF_RANGE"), ((2.0, 1.0), "OUT_OF_RANGE"), ((-1.0, 1.0), "OUT_OF_RANGE"),
                         ((0.0, 7.0), "TOO_LONG"), ((1.0, None), "TOO_LONG")):  # fmt: skip
        with pytest.raises(ClipError) as caught:
            decode_audio(data, 5, 10**6, 16_000, part_s=part_s)
        assert caught.value.code == code


def test_decode_audio() -> None:
    sound = decode_audio(wav(tone(2, 22_050), 22_050), max_duration_s=10, max_bytes=10**6, sample_rate_hz=16_000)
    assert sound.shape == pytest.approx((32_000,), abs=2)
    assert np.corrcoef(sound[16_500:31_500], tone(2, 16_000)[16_500:31_500])[0, 1] > 0.99
    assert len(decode_audio(make_clip(), 10, 10**6, 16_000)) == pytest.approx(32_000, abs=2500)
    for code, data, limit_s, limit in (
        ("EMPTY_AUDIO", wav(np.zeros(0, np.float32), 16_000), 10, 10**6),
        ("EMPTY_FILE", b"", 10, 10**6),
        ("UNREADABLE", b"hello" * 100, 10, 10**6),
        ("NO_AUDIO", make_clip(has_audio=False), 10, 10**6),
        ("TOO_LONG", wav(tone(2, 16_000), 16_000), 1, 10**6),
        ("TOO_LARGE", wav(tone(2, 16_000), 16_000), 10, 1000),
    ):
        with pytest.raises(ClipError) as caught:
            decode_audio(data, limit_s, limit, 16_000)
        assert caught.value.code == code


def sweep(duration_s: float, sample_rate_hz: int) -> np.ndarray:
    """A tone that rises by 200 Hz a second from 300 Hz: its pitch tells the time."""
    t = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    return (0.5 * np.sin(2 * np.pi * (300 * t + 100 * t**2))).astype(np.float32)


def sound_file(kind: str, duration_s: float = 12.0) -> bytes:
    """A sound without a video, in the container and codec of a common file name."""
    container, codec, rate_hz = {
        "wav": ("wav", "pcm_s16le", 44_100),
        "mp3": ("mp3", "libmp3lame", 44_100),
        "flac": ("flac", "flac", 44_100),
        "ogg": ("ogg", "libopus", 48_000),
        "m4a": ("mp4", "aac", 44_100),
    }[kind]
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(sweep(duration_s, rate_hz)[None], "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = rate_hz, Fraction(1, rate_hz), 0
        resampler = av.AudioResampler(stream.format.name, "mono", rate_hz, frame_size=stream.frame_size or 1152)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return sink.getvalue()


def pitch_hz(audio: np.ndarray, at_s: float) -> float:
    """The loudest pitch of a tenth of a second of sound at 16 kHz."""
    part = audio[round(at_s * 16_000) :][:1600] * np.hanning(1600)
    return float(np.abs(np.fft.rfft(part, 16_000)).argmax())


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "ogg", "m4a"])
def test_a_sound_alone_is_placed_in_time_as_that_of_a_video(kind: str) -> None:
    """Also far into a file, where reading begins in the middle."""
    data, cfg = sound_file(kind), DecodeConfig()
    assert not shows_video(data, cfg)
    whole = decode_sound(data, None, None, cfg)
    assert whole.duration_s == len(whole.audio) / 16_000 == pytest.approx(12, abs=0.1)
    assert (whole.channels, whole.source_sample_rate_hz) == (1, 48_000 if kind == "ogg" else 44_100)
    for start_s, end_s in ((0.0, 2.0), (5.0, 7.0), (10.5, 11.5)):
        part = decode_sound(data, start_s, end_s, cfg)
        assert len(part.audio) == round((end_s - start_s) * 16_000)
        for at_s in (0.1, end_s - start_s - 0.2):
            assert pitch_hz(part.audio, at_s) == pytest.approx(300 + 200 * (start_s + at_s + 0.05), abs=12)
    for window, code in (((13.0, 14.0), "OUT_OF_RANGE"), ((2.0, 1.0), "OUT_OF_RANGE"), ((0.0, 11.0), "TOO_LONG")):
        with pytest.raises(ClipError) as found:
            decode_sound(data, *window, DecodeConfig(max_duration_s=10))
        assert found.value.code == code


def test_the_sound_of_a_video_is_the_same_with_its_pictures_and_without() -> None:
    cfg = DecodeConfig()
    for data in (make_clip(), make_clip(start_s=1.5), make_clip(duration_s=5.0)):
        assert shows_video(data, cfg)
        for window in ((None, None), (0.5, 1.5), (1.2, 1.9)):
            clip, sound = decode_clip(data, *window, cfg), decode_sound(data, *window, cfg)
            np.testing.assert_array_equal(sound.audio, clip.audio)
            assert (sound.channels, sound.source_sample_rate_hz) == (clip.channels, clip.source_sample_rate_hz)
    with pytest.raises(ClipError, match="NO_AUDIO"):
        decode_sound(make_clip(has_audio=False), None, None, cfg)
