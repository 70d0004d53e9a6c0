"""The door to media files: whatever the order of the streams and the encoding of the tags, the clip is the same."""

import io
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from aai.media.container import audio_stream, find_audio, find_video, open_media, packets, video_stream
from aai.media.decode import decode_audio
from aai.media.limits import ClipError, Deadline, DecodeConfig
from aai.media.measure import measure_bytes
from aai.media.shots import extent
from aai.schema import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from tests.clips import latin1_title, make_clip, make_moving, remuxed, tone
from tests.formats import CONTAINERS
from tests.hostile import forged_wav

CFG = DecodeConfig()


def content(data: bytes, start_s: float | None = None, end_s: float | None = None) -> dict[str, object]:
    """A file's MEASURED_ROW without what names its bytes."""
    row = measure_bytes(data, start_s, end_s, CFG)
    return {name: value for name, value in row.items() if name not in ("clip_id", "content_hash")}


@pytest.mark.parametrize("window", [(None, None), (1.2, 2.5)], ids=["whole", "window"])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_sound_first_file_gives_the_row_of_a_video_first_one(
    container: str, window: tuple[float | None, float | None]
) -> None:
    """The window too reaches the end of the streams."""
    usual, other = (remuxed(make_clip(), container, sound_first=first) for first in (False, True))
    with av.open(io.BytesIO(other), "r") as check:
        assert [stream.type for stream in check.streams] == ["audio", "video"]
    row = content(other, *window)
    assert row["code"] is None, row["message"]
    assert row == content(usual, *window)
    assert extent(other, CFG, 60) == extent(usual, CFG, 60)


@pytest.mark.parametrize("sound_first", [False, True])
def test_the_end_of_each_stream_is_told_apart(sound_first: bool) -> None:
    data = remuxed(make_clip(), sound_first=sound_first)
    with open_media(data, CFG.max_bytes, CFG.max_streams) as container:
        streams = [video_stream(container, CFG), audio_stream(container)]
        last = [packet.stream.index for packet in packets(container, streams, Deadline(60)) if not packet.size]
    assert sorted(last) == [0, 1]


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_title_that_is_no_utf8_rejects_no_clip(container: str) -> None:
    source = make_moving("mpeg4", num_frames=20, sound="libmp3lame")
    plain, tagged = remuxed(source, container), latin1_title(source, container)
    row = content(tagged)
    assert row["code"] is None, row["message"]
    assert row == content(plain)
    assert extent(tagged, CFG, 60) == extent(plain, CFG, 60)


def wav_with_title(title: bytes) -> bytes:
    """Half a second of sound with an INAM tag."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((tone(0.5, 16_000) * 32_767).astype("<i2").tobytes())
    chunk = b"INAM" + len(title).to_bytes(4, "little") + title
    data = sink.getvalue() + b"LIST" + (4 + len(chunk)).to_bytes(4, "little") + b"INFO" + chunk
    return data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]


def test_a_wav_with_such_a_title_is_heard() -> None:
    plain, tagged = wav_with_title(b"cafe"), wav_with_title("café".encode("latin-1"))
    assert measure_bytes(tagged, None, None, CFG)["code"] == "NO_VIDEO"  # opened, and rightly told what it is
    assert np.array_equal(decode_audio(tagged, 10, 10**6, 16_000), decode_audio(plain, 10, 10**6, 16_000))


def test_a_file_is_opened_within_its_limits_or_not_at_all() -> None:
    data = make_clip()
    for code, given, max_bytes, max_streams in (
        ("EMPTY_FILE", b"", 10**6, 16),
        ("TOO_LARGE", data, len(data) - 1, 16),
        ("TOO_LARGE", data, 10**6, 1),
        ("UNREADABLE", b"ffconcat version 1.0\nfile '/etc/hostname'\n", 10**6, 16),
    ):
        with pytest.raises(ClipError) as caught:
            open_media(given, max_bytes, max_streams)
        assert caught.value.code == code
    with pytest.raises(ClipError, match="UNREADABLE"):
        open_media(data, len(data), 16, formats="flac")


def test_a_stream_that_is_not_there_is_named() -> None:
    with open_media(make_clip(has_audio=False), 10**6, 16) as container:
        assert find_audio(container) is None
        with pytest.raises(ClipError, match="NO_AUDIO"):
            audio_stream(container)
        with pytest.raises(ClipError, match="TOO_LARGE"):
            video_stream(container, CFG.model_copy(update={"max_pixels": 96 * 64 - 1}))
    with open_media(make_clip(has_video=False), 10**6, 16) as container, pytest.raises(ClipError, match="NO_VIDEO"):
        video_stream(container, CFG)


def with_tracks(sizes: tuple[int, ...], sounds: tuple[Disposition, ...], container: str = "matroska") -> bytes:
    """A file of half a second with videos of these widths and sounds of these dispositions."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        videos = []
        for width in sizes:
            video = out.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = width, width * 3 // 4, "yuv420p"
            videos.append(video)
        heard = []
        for disposition in sounds:
            heard.append(out.add_stream("aac", rate=16_000, layout="mono"))
            heard[-1].disposition = disposition
        for video in videos:
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((video.height, video.width, 3), 90, np.uint8), "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
        for sound in heard:
            frame = av.AudioFrame.from_ndarray(tone(0.5, 16_000)[None], "fltp", "mono")
            frame.sample_rate = 16_000
            out.mux([*sound.encode(frame), *sound.encode(None)])
    return sink.getvalue()


@pytest.mark.parametrize(
    ("sounds", "chosen"),
    [
        ((Disposition(0), Disposition.default), 1),
        ((Disposition(0), Disposition(0)), 0),
        ((Disposition.visual_impaired, Disposition(0)), 1),
        ((Disposition.comment, Disposition.default), 1),
    ],
)
def test_the_default_sound_is_heard_and_the_largest_video_seen(sounds: tuple[Disposition, ...], chosen: int) -> None:
    data = with_tracks((64, 96, 32), sounds)
    with open_media(data, 10**7, 16) as container:
        assert audio_stream(container) is container.streams.audio[chosen]
        assert video_stream(container, CFG) is container.streams.video[1]
        small = CFG.model_copy(update={"max_pixels": 64 * 48})
        assert find_video(container, small) is container.streams.video[0]  # the largest that may be decoded
    row = content(data)
    assert (row["code"], row["width"], row["height"]) == (None, 96, 72)


def test_a_codec_that_is_not_known_is_told_from_a_stream_that_is_not_there() -> None:
    data = with_tracks((64,), (Disposition.default,))
    for name, other, code in (
        (b"A_AAC", b"A_XYZ", "UNSUPPORTED_AUDIO"),
        (b"V_MPEG4/ISO/ASP", b"V_XYZ/XYZ/XYZ/X", "UNSUPPORTED_VIDEO"),
    ):
        assert name in data
        assert content(data.replace(name, other))["code"] == code
    with pytest.raises(ClipError, match="UNSUPPORTED_AUDIO"):
        decode_audio(forged_wav(kind=0x7777), 10, 10**6, 16_000)


def test_endings_of_all_containers_count_as_media() -> None:
    assert {f".{ending}" for ending in CONTAINERS} < {*VIDEO_SUFFIXES}
    assert len({*MEDIA_SUFFIXES}) == len(MEDIA_SUFFIXES)


def test_packets_end_with_the_time_that_is_given() -> None:
    with open_media(make_clip(), 10**6, 16) as container, pytest.raises(ClipError, match="TIMEOUT"):
        list(packets(container, [video_stream(container, CFG)], Deadline(1e-9)))
