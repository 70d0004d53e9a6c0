"""Which video a clip came from: its file, or what several files cut from one video have in common in their names."""

import re

from aai import storage
from aai.schema import AUDIO_SUFFIXES
from pipelines.manifests.row import ManifestRow


def place_of(row: ManifestRow) -> str:
    """The file, or the member of a tar, that a clip lies in."""
    part = storage.member(row.uri)
    return f"{part.file}/{part.name}" if part else row.uri


def names_sound(uri: str) -> bool:
    """Whether a file, or a member of a tar, is named as one that holds sound alone: such a one may lack a video."""
    part = storage.member(uri)
    return (part.name if part else uri).lower().endswith(AUDIO_SUFFIXES)


def source_of(row: ManifestRow, pattern: str | None) -> str:
    """The video that a clip came from: what the group of `pattern` finds in its file's name, else `place_of` it."""
    place = place_of(row)
    match = re.search(pattern, place.rsplit("/", 1)[-1]) if pattern else None
    return (match[1] if match else None) or place
