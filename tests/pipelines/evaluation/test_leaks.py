"""Near duplicates between held-out and training clips."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from aai import storage
from aai.media.duplicates import WholeConfig
from pipelines.evaluation.clips import EvaluatedClips
from pipelines.evaluation.leaks import near_overlap

RNG = np.random.default_rng(0)


def drawn() -> bytes:
    return RNG.integers(0, 256, 32, np.uint8).tobytes()


def with_bits(data: bytes, bits: int) -> bytes:
    """The hash with its first `bits` bits the other way round."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8))
    flat[:bits] ^= 1
    return np.packbits(flat).tobytes()


SEEN, HEARD = drawn(), drawn()
TRAIN = {"t0": (SEEN, HEARD), "t1": (drawn(), drawn())}


def found(
    folder: Path, test: dict[str, tuple[bytes | None, bytes | None]], cfg: WholeConfig | None = None
) -> int | None:
    rows = [
        {"clip_id": name, "video_hash": video, "audio_hash": audio} for name, (video, audio) in (TRAIN | test).items()
    ]
    types = pa.schema([("clip_id", pa.string()), ("video_hash", pa.binary()), ("audio_hash", pa.binary())])
    storage.write_table(f"{folder}/shard-0.parquet", pa.Table.from_pylist(rows, schema=types))
    sides = (pa.table({"clip_id": list(names)}) for names in (test, TRAIN))
    return near_overlap(EvaluatedClips(*sides), str(folder), cfg or WholeConfig())


def test_both_sound_and_pictures_must_be_alike(tmp_path: Path) -> None:
    test = {
        "another encoding": (with_bits(SEEN, 24), with_bits(HEARD, 64)),
        "one bit too many": (with_bits(SEEN, 25), HEARD),
        "another sound": (SEEN, with_bits(HEARD, 65)),
        "another clip": (drawn(), drawn()),
    }
    assert found(tmp_path, test) == 1
    assert found(tmp_path, test, WholeConfig(max_video_bits=25)) == 2
    assert found(tmp_path, test, WholeConfig(max_audio_bits=65)) == 2


def test_what_was_not_looked_at_is_no_zero(tmp_path: Path) -> None:
    assert found(tmp_path, {"a": (None, HEARD), "b": (SEEN, None)}) is None
    assert found(tmp_path, {"a": (drawn(), drawn()), "b": (None, HEARD)}) is None, "one that nobody looked at"
    assert found(tmp_path, {"a": (drawn(), drawn())}) == 0
    assert found(tmp_path, {"a": (drawn(), drawn())}, WholeConfig(enabled=False)) is None
