"""Fingerprints of what a stage reads and writes: the same wherever it lies, in one listing."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from aai import storage

JSON_BYTES = 2**20
"""JSON files up to this size count by their content, all other files of a folder by name and size."""
MISSING = "missing"


def fingerprint(uri: str) -> str:
    """Of a file its content; of a folder the names and sizes of its files, and the content of its small JSON files.

    A command's own bookkeeping does not count: what is named _..., and the link to Ray's logs.
    """
    sizes = storage.file_sizes(uri) if storage.exists(uri) else {}
    if not sizes:
        return MISSING
    base = storage.absolute(uri).rstrip("/")
    told, sha = {storage.absolute(file): size for file, size in sizes.items()}, hashlib.sha256()
    if list(told) == [base]:
        sha.update(storage.read_bytes(uri))
        return sha.hexdigest()[:24]
    for file, size in told.items():
        name = file.removeprefix(f"{base}/")
        if any(part.startswith("_") or part == "ray-logs" for part in name.split("/")):
            continue
        sha.update(f"{name}\n{size}\n".encode())
        if name.endswith(".json") and size <= JSON_BYTES:
            sha.update(storage.read_bytes(file))
    return sha.hexdigest()[:24]


@cache
def code_fingerprint() -> str:
    """Of this code as it lies here: a change that is not committed yet counts, too."""
    root, sha = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in ("aai", "pipelines"):
        for file in sorted((root / package).rglob("*.py")):
            sha.update(f"{file.relative_to(root)}\n".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()[:24]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"filters.min_clip_sim": "0.2"}: settings by their dotted names, as JSON."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value, sort_keys=True)
    return found
