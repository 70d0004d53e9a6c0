import hashlib
import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from aai.media.decode import decode_clip
from aai.media.limits import DecodeConfig
from aai.media.measure import DECODER, DECODER_VERSION, MEASURED_ROW, Shown, clip_id, kind_of, measure_bytes
from aai.media.waveform import read_sound, sound_rate_hz
from aai.schema import SIGNALS
from tests.clips import make_clip, remuxed
from tests.formats import turned


def test_a_good_clip_is_a_row_without_an_error() -> None:
    data, cfg = make_clip(), DecodeConfig()
    row, clip = measure_bytes(data, None, None, cfg), decode_clip(data, None, None, cfg)
    assert list(row) == MEASURED_ROW.names
    assert pa.RecordBatch.from_pylist([row], schema=MEASURED_ROW).to_pylist() == [row]
    assert [row[name] for name in ("stage", "code", "message", "transient")] == [None] * 4
    assert all(row[field.name] is not None for field in SIGNALS)
    assert np.abs(read_sound(row["audio"]) - clip.audio).max() <= 1 / 32_768
    assert row["frame_pts_s"] == clip.frame_pts_s
    for jpeg, frame in zip(row["frames"], clip.frames, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(jpeg)))
        assert np.abs(picture.astype(int) - frame).mean() < 3


def test_sound_is_kept_at_the_rate_that_is_set() -> None:
    for rate_hz in (8_000, 48_000):
        row = measure_bytes(make_clip(), None, None, DecodeConfig(sample_rate_hz=rate_hz))
        assert sound_rate_hz(row["audio"]) == rate_hz
        assert len(read_sound(row["audio"])) / rate_hz == pytest.approx(row["duration_s"], abs=0.2)


def test_ids_tell_content_and_window() -> None:
    data, cfg = make_clip(), DecodeConfig()
    whole, again, part, other = (
        measure_bytes(*args, cfg)
        for args in ((data, None, None), (data, None, None), (data, 0.0, 1.0), (make_clip(duration_s=1), None, None))
    )
    assert whole == again
    assert whole["content_hash"] == part["content_hash"] != other["content_hash"]
    assert len({row["clip_id"] for row in (whole, part, other)}) == 3


def test_a_bad_clip_is_a_row_with_the_reason() -> None:
    for data, cfg, code, transient in (
        (b"", DecodeConfig(), "EMPTY_FILE", False),
        (b"x" * 500, DecodeConfig(), "UNREADABLE", False),
        (make_clip(), DecodeConfig(timeout_s=1e-9), "TIMEOUT", True),
    ):
        row = measure_bytes(data, None, None, cfg)
        assert list(row) == MEASURED_ROW.names
        assert (row["stage"], row["code"], row["transient"]) == ("decode", code, transient)
        assert row["message"]
        assert row["clip_id"]
        assert row["audio"] is None
        assert row["decoder"] == DECODER


MADE: dict[str, tuple[Callable[[], bytes], list[float]]] = {
    "plain": (make_clip, [2.02, 96, 64, 10, 2, -12.1, 65.9]),
    "5.1": (lambda: make_clip(layout="5.1", sample_rate_hz=48_000), [2.01, 96, 64, 10, 6, -6.2, 65.9]),
    "late": (lambda: make_clip(start_s=1.5), [2.04, 96, 64, 10, 2, -12.1, 65.9]),
    "uneven": (lambda: make_clip([0.0, 0.1, 0.15, 0.9, 1.0, 1.8]), [2.02, 96, 64, 2.8, 2, -12.1, 53.0]),
    "sound first": (lambda: remuxed(make_clip(), "matroska", True), [2.04, 96, 64, 10, 2, -12.1, 65.9]),
    "lying": (lambda: turned(make_clip(), 90), [2.02, 64, 96, 10, 2, -12.1, 65.9]),
}
NAMES = ("duration_s", "width", "height", "fps", "channels", "rms_db", "luma_mean")


@pytest.mark.parametrize("name", MADE)
def test_another_row_of_the_same_file_is_another_version_of_the_decoder(name: str) -> None:
    """When this fails, count DECODER_VERSION up and write down the figures of now."""
    make, figures = MADE[name]
    row = measure_bytes(make(), None, None, DecodeConfig())
    assert (DECODER_VERSION, [row[name] for name in NAMES]) == (2, pytest.approx(figures, abs=0.06))


def still(size: tuple[int, int] = (120, 80), kind: str = "JPEG") -> bytes:
    """A picture that is dark on its left half."""
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    pixels[:, : size[0] // 2] = 20
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


SOUND_ALONE = Shown(must_be_video=False)
SEEN = ("width", "height", "fps", "av_gap_s", "luma_mean", "luma_std", "motion", "video_hash", "picture_print")


def test_a_sound_alone_is_a_row_in_which_nothing_is_seen() -> None:
    data, cfg = make_clip(has_video=False), DecodeConfig()
    row = measure_bytes(data, None, None, cfg, shown=SOUND_ALONE)
    assert list(row) == MEASURED_ROW.names
    assert pa.RecordBatch.from_pylist([row], schema=MEASURED_ROW).to_pylist() == [row]
    assert [name for name in MEASURED_ROW.names if row[name] is None] == [
        *(name for name in MEASURED_ROW.names if name in SEEN),
        "stage",
        "code",
        "message",
        "transient",
    ]
    assert (row["frames"], row["frame_pts_s"], kind_of(row)) == ([], [], "none")
    beside = measure_bytes(make_clip(), None, None, cfg)
    assert kind_of(beside) == "frames"
    for name in ("rms_db", "audio_hash", "sound_print", "channels", "source_sample_rate_hz"):
        assert row[name] == beside[name], name
    missing = measure_bytes(data, None, None, cfg)
    assert (missing["code"], kind_of(missing)) == ("NO_VIDEO", None)
    # Whatever may have no video, a video is measured as ever.
    assert measure_bytes(make_clip(), None, None, cfg, shown=SOUND_ALONE) == beside


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_still_is_the_picture_of_its_sound(kind: str) -> None:
    cfg, given = DecodeConfig(frame_size_px=40), still(kind=kind)
    row = measure_bytes(make_clip(has_video=False), None, None, cfg, shown=Shown(still=given))
    (jpeg,) = row["frames"]
    picture = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    assert picture.shape == (40, 60, 3)
    assert abs(picture[:, :28].mean() - 20) < 4
    assert abs(picture[:, 32:].mean() - 200) < 4
    assert (row["width"], row["height"], row["frame_pts_s"], kind_of(row)) == (120, 80, [0.0], "still")
    assert row["luma_mean"] == pytest.approx(110, abs=3)
    assert [row[name] for name in ("fps", "av_gap_s", "motion", "video_hash", "picture_print")] == [None] * 5
    ids = {
        measure_bytes(data, None, None, cfg, shown=shown)["clip_id"]
        for data in (make_clip(has_video=False),)
        for shown in (Shown(still=given), Shown(still=still((90, 80), kind)), SOUND_ALONE)
    }
    assert len(ids) == 3, "another picture is another clip"
    # What a video shows itself does not count beside a picture of its own.
    assert kind_of(measure_bytes(make_clip(), None, None, cfg, shown=Shown(still=given))) == "still"


def test_a_bad_still_is_a_row_with_the_reason() -> None:
    data = make_clip(has_video=False)
    for given, code, message in (
        (b"", "UNREADABLE", "its picture is none of PNG, JPEG, WEBP"),
        (still()[:300], "UNREADABLE", "its picture cannot be decoded"),
        (still((5000, 5000)), "TOO_LARGE", "its picture 5000x5000 px is over the limit"),
    ):
        row = measure_bytes(data, None, None, DecodeConfig(), shown=Shown(still=given))
        assert (row["stage"], row["code"]) == ("decode", code)
        assert row["message"].startswith(message)
        assert row["clip_id"] == clip_id(row["content_hash"], None, None, hashlib.sha256(given).hexdigest())
