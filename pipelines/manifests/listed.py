"""A list of clips in a text file: what is to be left out, or looked for."""

import re

from aai import storage
from aai.errors import UserError

MAX_BYTES = 1 << 30


def read_list(setting: str, uri: str) -> frozenset[str]:
    """The entries of a text file, one a line: clip ids, content hashes (SHA-256 of a file) or URIs.

    Empty lines and those that begin with # are left out; relative paths count from here. Raises UserError for a file
    that is absent or says nothing.
    """
    if not storage.exists(uri):
        raise UserError(setting, uri, "no such file", "give a text file with a clip id, content hash or URI a line")
    try:
        lines = storage.read_bytes(uri, MAX_BYTES).decode("utf-8-sig").splitlines()
    except (ValueError, IsADirectoryError) as error:
        raise UserError(setting, uri, f"is no text ({error})", "give a clip id, content hash or URI a line") from error
    entries = {line.strip() for line in lines}
    entries = {_as_in_tables(entry) for entry in entries if entry and not entry.startswith("#")}
    if not entries:
        raise UserError(setting, uri, "names no clip", "give a clip id, content hash or URI a line")
    return frozenset(entries)


def _as_in_tables(entry: str) -> str:
    """An entry as tables have it: a hash in small letters, a path absolute."""
    if re.fullmatch(r"[0-9A-Fa-f]{64}|[0-9A-Fa-f]{24}", entry):
        return entry.lower()
    return storage.absolute(entry) if "/" in entry else entry
