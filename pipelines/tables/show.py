"""All that the tables know of one clip, as text and as a contact sheet."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.features import MANIFEST, FeatureManifest
from aai.media.waveform import read_sound, sound_rate_hz
from aai.schema import SIGNALS, SIMILARITIES, further_columns

TITLE_CHARS = 105
NAMED = 5
"""Candidates named when an ID fits several clips."""
_HEAD = ("clip_id", "content_hash", "uri", "start_s", "end_s", "split", "labels", "caption")
_VERDICT = ("stage", "code", "message", "transient", "flags")

Row = dict[str, Any]
Place = tuple[str, int]
"""A file and a row number within it."""


def show(wanted: str, table: str, features: str | None, out: str) -> Row:
    """Prints what is known of a clip and writes OUT/CLIP_ID.png; returns both.

    wanted: a clip_id, the beginning of one, or a part of a uri. table: a folder with accepted/ and rejected/, or one
    such table. A clip may have several rows: the kept one, and rejected doubles with the same content. Raises UserError
    when nothing or more than one clip fits.
    """
    places = _find(wanted, table)
    rows = [_read(place) for place in places]
    first = rows[0]
    found = _features(features, first["clip_id"]) if features and first["clip_id"] else None
    for row, (file, number) in zip(rows, places, strict=True):
        _print_row(row, f"{file} row {number}")
        print(f"  {'written by':<22} {storage.written_by(file)}")
    if features:
        _print_features(features, found)
    name = first["clip_id"] or first["uri"].rsplit("/", 1)[-1]
    sheet = storage.join(out, f"{name}.png")
    storage.write_bytes(sheet, contact_sheet(first))
    print(f"contact sheet: {sheet}")
    return {"rows": rows, "features": found, "sheet": sheet}


# ---------------------------------------------------------------- finding


def _find(wanted: str, table: str) -> list[Place]:
    """Where the rows of the clip are, accepted first."""
    hits: dict[str, list[tuple[str, str, Place]]] = {"id": [], "prefix": [], "uri": [], "part": []}
    for file, ids, uris in _names(table):
        columns = {
            "id": pc.equal(ids, wanted),
            "prefix": pc.starts_with(ids, wanted),
            "uri": pc.equal(uris, wanted),
            "part": pc.match_substring(uris, wanted),
        }
        for kind, fits in columns.items():
            for i in np.flatnonzero(pc.fill_null(fits, False).to_numpy()).tolist():
                uri = uris[i].as_py()
                hits[kind].append((ids[i].as_py() or uri, uri.rsplit("/", 1)[-1], (file, i)))
    # The strictest reading that fits anything counts.
    found = next((hits[kind] for kind in hits if hits[kind]), [])
    if not found:
        remedy = "give a clip_id, the beginning of one, or a part of a uri; or another --table"
        raise UserError("id", wanted, f"no such clip in {table}", remedy)
    clips = {clip: media for clip, media, _ in found}
    if len(clips) > 1:
        named = [f"{clip} {media}" for clip, media in clips.items()]
        some = ", ".join(named[:NAMED]) + (", ..." if len(clips) > NAMED else "")
        raise UserError("id", wanted, f"fits {len(clips)} clips ({some})", "give more of it")
    return [place for *_, place in found]


def _names(table: str) -> Iterator[tuple[str, pa.ChunkedArray, pa.ChunkedArray]]:
    """(file, clip ids, uris) of every file of accepted/ and rejected/, or of a single table."""
    files: list[str] = []
    for part in ("accepted", "rejected"):
        files += storage.list_files(storage.join(table, part), ".parquet")
    files = files or storage.list_files(table, ".parquet")
    if not files:
        raise UserError("table", table, "holds no tables", "run `aai curate` first, or give another --table")
    for file in files:
        names = storage.read_table(file, ["clip_id", "uri"])
        yield file, names["clip_id"], names["uri"]


def _read(place: Place) -> Row:
    """A whole row."""
    file, number = place
    fs, path = storage.filesystem(file)
    with pq.ParquetFile(path, filesystem=fs) as table:
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if number < size:
                return dict(table.read_row_group(group).slice(number, 1).to_pylist()[0])
            number -= size
    raise IndexError(f"{file} has no row {place[1]}")


def _features(uri: str, clip_id: str) -> Row | None:
    """Shape, mean norm and range of a clip's features; None when the table does not have it."""
    if not storage.exists(storage.join(uri, MANIFEST)):
        return None
    manifest = FeatureManifest.read(uri)
    for file in storage.list_files(uri, ".parquet"):
        places = pc.index(storage.read_table(file, ["clip_id"])["clip_id"], clip_id).as_py()
        if places < 0:
            continue
        row = _read((file, places))
        out: Row = {"file": file, "foundation": dict(manifest.foundation), "dtype": manifest.dtype}
        out["written_by"] = storage.written_by(file)
        for name in ("image_features", "text_features", "latents"):
            values = np.array(row[name], np.float32).reshape(manifest.shape_of(name))
            norms = np.linalg.norm(values.reshape(len(values), -1), axis=1)
            out[name] = {
                "shape": list(values.shape),
                "norms": [round(float(norm), 4) for norm in norms],
                "mean": round(float(values.mean()), 4),
                "std": round(float(values.std()), 4),
            }
        return out
    return None


# ---------------------------------------------------------------- printing


def _print_row(row: Row, where: str) -> None:
    verdict = "accepted" if "frames" in row else "rejected"
    print(f"{verdict}: {where}")
    for name in (*_HEAD, *_VERDICT):
        if name in row and row[name] not in (None, []):
            print(f"  {name:<22} {_text(row[name])}")
    for field in (*SIGNALS, *SIMILARITIES):
        if row.get(field.name) is not None:
            print(f"  {field.name:<22} {_text(row[field.name])}")
    for name in further_columns(row):
        if row[name] is not None:
            print(f"  {name:<22} {_text(row[name])}")
    if "frames" in row:
        print(f"  {'audio':<22} {len(row['audio']):,} bytes of FLAC, {sound_rate_hz(row['audio'])} Hz mono")
        sizes = sum(len(frame) for frame in row["frames"])
        print(f"  {'frames':<22} {len(row['frames'])} JPEG, {sizes:,} bytes, at {_text(row['frame_pts_s'])} s")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(_text(item) for item in value) if isinstance(value, list) else str(value)


def _print_features(uri: str, found: Row | None) -> None:
    if found is None:
        print(f"features: none in {uri}")
        return
    print(f"features: {found['file']}")
    models = ", ".join(f"{name} {value}" for name, value in found["foundation"].items())
    print(f"  {'foundation':<22} {models}; {found['dtype']}")
    print(f"  {'written by':<22} {found['written_by']}")
    for name in ("image_features", "text_features", "latents"):
        part = found[name]
        shape = " x ".join(map(str, part["shape"]))
        print(f"  {name:<22} {shape}, norms {_text(part['norms'])}, mean {part['mean']}, std {part['std']}")


# ---------------------------------------------------------------- the sheet


def contact_sheet(row: Row) -> bytes:
    """A PNG of a clip: its pictures with their times, its spectrogram, its signals. A rejected clip has its first
    picture at most, and no sound."""
    from matplotlib.figure import Figure

    frames, times = row.get("frames") or [], row.get("frame_pts_s") or []
    if not frames and row.get("thumbnail"):
        frames, times = [row["thumbnail"]], [None]
    columns = max(4, min(8, len(frames)))
    lines = max(1, -(-len(frames) // columns))
    figure = Figure(figsize=(1.9 * columns, 2.1 * lines + 3.4), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[*([2.1] * lines), 2.3])
    figure.suptitle(_title(row), fontsize=10, x=0.01, ha="left", parse_math=False)
    for i, (frame, time_s) in enumerate(zip(frames, times, strict=True)):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.imshow(np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")))
        axes.set_axis_off()
        axes.set_title("first picture" if time_s is None else f"{time_s:.2f} s", fontsize=8)
    if not frames:
        figure.add_subplot(grid[0, :]).set_axis_off()
    wide = columns - 1 - columns // 6
    _draw_sound(figure.add_subplot(grid[lines, :wide]), row)
    _draw_signals(figure.add_subplot(grid[lines, wide:]), row)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return sink.getvalue()


def _title(row: Row) -> str:
    verdict = f"rejected: {row['code']}: {row['message']}" if "code" in row else "accepted"
    flags = f", flags {', '.join(row['flags'])}" if row.get("flags") else ""
    # The end of a long uri tells more than its beginning.
    uri = row["uri"] if len(row["uri"]) <= TITLE_CHARS else f"...{row['uri'][-TITLE_CHARS:]}"
    text = [row["clip_id"] or "(no clip_id)", uri, f"{row['caption']}  [{row['split']}]", f"{verdict}{flags}"]
    return "\n".join(_printable(line)[: TITLE_CHARS + 3] for line in text)


def _printable(line: str) -> str:
    """The line without what a font does not have, or what would break it: neither may spoil the sheet."""
    return "".join(c if c.isprintable() else " " for c in line)


def _draw_sound(axes: Any, row: Row) -> None:
    if not row.get("audio"):
        axes.set_axis_off()
        axes.text(0, 0.5, "The sound of a rejected clip is not kept.", fontsize=8.5, color="0.4")
        return
    audio, rate_hz = read_sound(row["audio"]), sound_rate_hz(row["audio"])
    size = min(512, max(16, len(audio)))
    with np.errstate(divide="ignore"):  # digital silence
        axes.specgram(
            np.pad(audio, (0, size)), NFFT=size, Fs=rate_hz, noverlap=size * 3 // 4, cmap="magma",
            vmin=-120, vmax=-30,
        )  # fmt: skip
    axes.set_xlim(0, len(audio) / rate_hz)
    axes.set_xlabel("s", fontsize=8)
    axes.set_ylabel("Hz", fontsize=8)
    axes.tick_params(labelsize=7.5)


def _draw_signals(axes: Any, row: Row) -> None:
    axes.set_axis_off()
    numbers = [f.name for f in (*SIGNALS, *SIMILARITIES) if not pa.types.is_binary(f.type)]
    known = [name for name in numbers if row.get(name) is not None]
    for i, name in enumerate(known):
        y = 1 - (i + 0.5) / max(12, len(known))
        axes.text(0, y, name, fontsize=7, color="0.35", va="center", transform=axes.transAxes)
        axes.text(1, y, _text(row[name]), fontsize=7, ha="right", va="center", transform=axes.transAxes)
