"""WebDataset tars as a manifest: members are found by their headers and later read as ranges; nothing is unpacked."""

import json
import logging
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from aai import storage
from aai.errors import UserError
from aai.schema import MEDIA_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES
from pipelines.manifests.row import RawRow

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
REST = "(unreadable rest of the tar)"
"""Name of the member that stands for everything from a tar's damage on."""
_NOTES = (".txt", ".json", ".cls")
_KNOWN = {"caption", "text", "labels", "label", "split", "start_s", "end_s"}
"""Keys of a .json that have a meaning of their own."""
_MAX_NOTE_BYTES = 2**20
_BLOCK_BYTES = 256 * 1024  # read from S3 for each header that does not lie in the block before
_THREADS = 16
_TAIL_BYTES = 64 * 1024


class _Limited:
    """What tarfile may read of a tar: headers and notes, never the gigabytes that a forged size asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 2 * _MAX_NOTE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


@dataclass
class _Contents:
    """What one tar holds. `rest`: where the readable part ends, None for a sound tar."""

    media: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, size
    stills: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # the same, by name without its suffix
    notes: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (stem or key, suffix without its dot): content
    passed_over: int = 0
    rest: int | None = None


def refuse_compressed(uri: str) -> None:
    """Raises UserError for a compressed tar: its members cannot be read as ranges."""
    if uri.lower().endswith(COMPRESSED):
        rule = "is a compressed tar, of which no part can be read alone"
        raise UserError("manifest", uri, rule, "write it as a plain .tar (media is compressed already)")


def tars_rows(uris: list[str]) -> list[RawRow]:
    """The rows of several tars, in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:  # waiting for S3 is most of the work
        return list(chain.from_iterable(pool.map(tar_rows, uris)))


def tar_rows(uri: str) -> list[RawRow]:
    """One row per media member of a tar, with what the other members of its key (name up to the first dot) say of it.

    `.txt`: caption; `.json`: caption or text, labels or label, split, start_s, end_s; `.cls`: label. Sound beside a
    video of the same key is no clip of its own. `.jpg`, `.png` or `.webp` beside a sound alone: its still picture, if
    only the suffix tells their names apart. A damaged tar gives its readable members, and one row that stands for the
    rest and cannot be decoded, so that nothing is lost unseen.
    Raises UserError for a .txt, .json or .cls that cannot be read.
    """
    fs, path = storage.filesystem(uri)
    size = int(fs.size(path))
    with fs.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead") as file:
        found = _scan(uri, file, size)
    if found.passed_over:
        log.warning("manifest: %s: %d hidden, linked or sparse members are passed over", uri, found.passed_over)
    videos = {_key(name) for name, _, _ in found.media if name.lower().endswith(VIDEO_SUFFIXES)}
    rows = []
    for name, offset, length in found.media:
        if name.lower().endswith(VIDEO_SUFFIXES) or _key(name) not in videos:
            rows.append(_row(storage.Member(uri, offset, length, _printable(name)), name, found))
    if found.rest is not None:
        log.warning("manifest: %s is damaged from byte %d on; the members before it are used", uri, found.rest)
        rows.append(RawRow(uri=storage.Member(uri, found.rest, max(0, size - found.rest), REST).uri))
    return rows


def _scan(uri: str, file: BinaryIO, size: int) -> _Contents:
    found, end = _Contents(), 0
    try:
        for member, after in _members(_Limited(file), size):
            _take(uri, found, member, file)
            end = after
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        log.debug("%s: %s", uri, error)
        found.rest = end
        return found
    # tarfile takes a broken header for the end: a sound tar ends with a block of zeros, and nothing comes after.
    file.seek(end)
    tail = file.read(_TAIL_BYTES)
    if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
        found.rest = end + len(tail) - len(tail.lstrip(b"\0"))
    return found


def _members(file: Any, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members with the place where the next one begins. Raises TarError at a member that is not wholly there."""
    if not size:
        return
    tar: Any
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        before = 0
        while member := tar.next():
            if member.size < 0 or tar.offset <= before or (member.isreg() and member.offset_data + member.size > size):
                raise tarfile.ReadError(f"{member.name} reaches beyond the tar")
            before = tar.offset
            tar.members.clear()  # it would keep them all
            yield member, before


def _take(uri: str, found: _Contents, member: tarfile.TarInfo, file: BinaryIO) -> None:
    name = member.name
    is_note = name.lower().endswith(_NOTES)
    is_still = name.lower().endswith(STILL_SUFFIXES)
    if member.isdir() or not (is_note or is_still or name.lower().endswith(MEDIA_SUFFIXES)):
        return
    if not member.isreg() or member.issparse() or not _key(name).rsplit("/", 1)[-1]:
        found.passed_over += not is_still  # most tars of videos have pictures that nobody asks for
    elif is_still:
        found.stills.setdefault(name.rpartition(".")[0], (name, member.offset_data, member.size))
    elif not is_note:
        found.media.append((name, member.offset_data, member.size))
    elif member.size > _MAX_NOTE_BYTES:
        raise UserError("manifest", uri, f"{name} has {member.size} bytes", f"at most {_MAX_NOTE_BYTES} are read")
    else:
        file.seek(member.offset_data)
        stem, _, suffix = name.rpartition(".")
        note = file.read(member.size)
        found.notes[stem, suffix.lower()] = note
        found.notes.setdefault((_key(name), suffix.lower()), note)


def _key(name: str) -> str:
    """WebDataset's key: the folder, and the name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _row(member: storage.Member, name: str, found: _Contents) -> RawRow:
    """A media member with its caption, labels, split and window: from the notes of its own stem, else of its key."""
    texts = {}
    for suffix in ("txt", "json", "cls"):
        of_key = found.notes.get((_key(name), suffix), b"")
        note = found.notes.get((name.rpartition(".")[0], suffix), of_key)
        try:
            texts[suffix] = note.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            rule = f"the .{suffix} of {name} is not UTF-8 text"
            raise UserError("manifest", member.file, rule, "save it as UTF-8") from error
    fields = _fields(member.file, name, texts["json"])
    labels = fields.get("labels", fields.get("label", texts["cls"]))
    if not isinstance(labels, list):
        labels = [] if labels in (None, "") else [labels]
    image_uri = None
    if not name.lower().endswith(VIDEO_SUFFIXES) and (still := found.stills.get(name.rpartition(".")[0])):
        still_name, offset, size = still
        image_uri = storage.Member(member.file, offset, size, _printable(still_name)).uri
    return RawRow(
        uri=member.uri,
        image_uri=image_uri,
        start_s=fields.get("start_s"),
        end_s=fields.get("end_s"),
        caption=texts["txt"] or fields.get("caption") or fields.get("text"),
        labels=labels,
        split=fields.get("split"),
        extra={name: value for name, value in fields.items() if name not in _KNOWN},
    )


def _fields(uri: str, name: str, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise UserError("manifest", uri, f"the .json of {name} is not JSON ({error})", "mend it") from error
    if not isinstance(fields, dict):
        raise UserError("manifest", uri, f"the .json of {name} is no JSON object", "mend it")
    return fields
