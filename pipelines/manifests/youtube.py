"""Manifests of YouTube ids, the VGGSound and AudioSet CSVs, and the folder where their videos lie under many names."""

import csv
import io
import logging
import re
from collections.abc import Mapping

from aai import storage
from aai.errors import UserError
from aai.schema import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from pipelines.manifests.row import RawRow

log = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?:vggsound_|(?P<y>Y))?(?P<id>[\w-]{11})"
    r"(?:[_-](?P<start>\d+(?:\.\d+)?)(?:[_-](?P<end>\d+(?:\.\d+)?))?)?\.\w+",
    re.ASCII,
)
_ID = re.compile(r"[\w-]{11}", re.ASCII)
_MIN_END_MS = 1000  # clips are shorter than this in seconds, so a larger difference counts milliseconds


class _Videos:
    """Media files by YouTube id: ID_START[_END].EXT and YID.EXT are cut clips, ID.EXT is the whole video.

    START counts seconds, or milliseconds where START and END lie far apart.
    """

    def __init__(self, media_root: str) -> None:
        self.cut: dict[tuple[str, float], str] = {}
        self.whole: dict[str, str] = {}
        self.only: dict[str, str] = {}
        files = [uri for uri in storage.list_files(media_root) if uri.lower().endswith(MEDIA_SUFFIXES)]
        for uri in sorted(files, key=lambda uri: uri.lower().endswith(VIDEO_SUFFIXES)):  # video replaces sound
            if match := _NAME.fullmatch(uri.rsplit("/", 1)[1]):
                self._add(match, storage.absolute(uri))
        if not (self.cut or self.whole or self.only):
            rule = "holds no files named ID_START.mp4 or ID.mp4"
            raise UserError("media_root", media_root, rule, "give the videos' folder")
        self.root = media_root

    def _add(self, match: re.Match[str], uri: str) -> None:
        if match["start"]:
            start_s = float(match["start"])
            if match["end"] and float(match["end"]) - start_s >= _MIN_END_MS:
                start_s /= 1000
            self.cut[match["id"], start_s] = uri
        else:
            (self.only if match["y"] else self.whole)[match["id"]] = uri

    def find(self, video_id: str, start_s: float) -> tuple[str, bool]:
        """(URI, whether the file is the whole video); for a file that is not there, the name it would have."""
        cut = self.cut.get((video_id, start_s)) or self.only.get(video_id)
        if cut or video_id not in self.whole:
            missing = storage.join(self.root, f"{video_id}_{int(start_s):06d}.mp4")
            return cut or storage.absolute(missing), False
        return self.whole[video_id], True


def youtube_rows(
    manifest: str, text: str, media_root: str, default_split: str, label_names: str | None
) -> list[RawRow]:
    """The rows of a VGGSound or an AudioSet CSV, told apart by their content.

    VGGSound (Chen et al., ICASSP 2020): `id,start seconds,label,split`. AudioSet (Gemmeke et al., ICASSP 2017): comment
    lines, then `id, start seconds, end seconds, "label id,label id"`; `label_names` is its class_labels_indices.csv.
    Raises UserError for a line of another form.
    """
    cells = _cells(text)
    videos = _Videos(media_root)
    if not cells or _seconds(cells[0], 2) is None:
        return [_vggsound_row(manifest, line, videos) for line in cells]
    names = _label_names(label_names) if label_names else {}
    if not names:
        log.warning("manifest: without label_names the captions of %s are label ids", manifest)
    split = "test" if "eval" in manifest.rsplit("/", 1)[-1].lower() else default_split
    return [_audioset_row(manifest, line, videos, names, split) for line in cells]


def is_youtube(text: str) -> bool:
    """Whether the first line of a CSV looks like one of VGGSound or AudioSet: a YouTube id, a time and two cells."""
    first = next(iter(_cells(text)), [])
    return len(first) == 4 and _ID.fullmatch(first[0]) is not None and _seconds(first, 1) is not None


def _cells(text: str) -> list[list[str]]:
    """The cells of each line; comments and empty lines are left out."""
    lines = [line for line in io.StringIO(text) if line.strip() and not line.startswith("#")]
    cells = []
    for line in csv.reader(lines, skipinitialspace=True):
        cells.append([cell.strip() for cell in line])
    return cells


def _seconds(line: list[str], column: int) -> float | None:
    try:
        return float(line[column])
    except (ValueError, IndexError):
        return None


def _vggsound_row(manifest: str, line: list[str], videos: _Videos) -> RawRow:
    start_s = _seconds(line, 1)
    if len(line) != 4 or start_s is None:
        rule = f"is neither a VGGSound nor an AudioSet CSV (line {line})"
        raise UserError("manifest", manifest, rule, "give id,start,label,split or id,start,end,labels")
    uri, is_whole = videos.find(line[0], start_s)
    window = (start_s, start_s + 10) if is_whole else (None, None)  # every VGGSound clip has 10 s
    return RawRow(uri=uri, start_s=window[0], end_s=window[1], caption=line[2], labels=[line[2]], split=line[3])


def _audioset_row(manifest: str, line: list[str], videos: _Videos, names: Mapping[str, str], split: str) -> RawRow:
    start_s, end_s = _seconds(line, 1), _seconds(line, 2)
    if len(line) != 4 or start_s is None or end_s is None:
        raise UserError("manifest", manifest, f"is no AudioSet CSV (line {line})", "give id, start, end, labels")
    uri, is_whole = videos.find(line[0], start_s)
    window = (start_s, end_s) if is_whole else (None, None)
    ids = [label.strip() for label in line[3].split(",")]
    labels = [names.get(label, label) for label in ids if label]
    return RawRow(uri=uri, start_s=window[0], end_s=window[1], caption=", ".join(labels), labels=labels, split=split)


def _label_names(file: str) -> dict[str, str]:
    """{label id: name} of AudioSet's class_labels_indices.csv (index, mid, display_name)."""
    if not storage.exists(file):
        raise UserError("label_names", file, "does not exist", "give AudioSet's class_labels_indices.csv")
    try:
        lines = csv.DictReader(io.StringIO(storage.read_bytes(file).decode("utf-8-sig"), newline=""))
        return {line["mid"]: line["display_name"] for line in lines}
    except (KeyError, UnicodeDecodeError) as error:
        rule = "is not a CSV with the columns mid and display_name"
        raise UserError("label_names", file, rule, "give AudioSet's class_labels_indices.csv") from error
