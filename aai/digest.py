"""The one way to name content by a short hash."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(value: Any, length: int = 16) -> str:
    """`length` hex digits of the SHA-256 of a value as canonical JSON: equal values, equal digest.

    value: what JSON knows (tuples count as lists). The order of keys does not matter, the order of items does.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def stored_digest(value: Any, length: int = 16, sort_keys: bool = False) -> str:
    """As `digest`, of JSON with spaces, and with keys in their own order unless they are sorted.

    Tables, ledgers and settings files of before carry digests of this form: to go on with them it has to stay. For
    anything new, use `digest`.
    """
    text = json.dumps(value, sort_keys=sort_keys)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def stored_digest_of_lists(lists: Iterable[Iterable[Any]], further: Iterable[Any] = (), length: int = 16) -> str:
    """`stored_digest` of a list of lists with sorted keys, whose items need not all be there at once.

    further: other values that stand behind the lists.
    """
    sha, encode, comma = hashlib.sha256(b"["), json.JSONEncoder(sort_keys=True).encode, ""
    for items in lists:
        sha.update(f"{comma}[".encode())
        for place, item in enumerate(items):
            sha.update(f"{', ' if place else ''}{encode(item)}".encode())
        sha.update(b"]")
        comma = ", "
    for value in further:
        sha.update(f"{comma}{encode(value)}".encode())
        comma = ", "
    sha.update(b"]")
    return sha.hexdigest()[:length]
