"""Which frozen models a run stands on, without loading them (which takes seconds of imports alone)."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from aai.config import Config
from aai.errors import UserError

TOY_WEIGHTS = Path(__file__).parents[1] / "toy" / "weights"
WEIGHTS, LOADED = (".safetensors",), (".safetensors", ".json", ".txt", ".model")
"""Ends of the files that an older release hashed, and of those that are loaded: weights, settings, tokenizers."""


class FoundationSpec(Config):
    """Which frozen models a run stands on; they are recorded in every table and bundle."""

    clip: str = "toy:clip"
    """CLIPModel: local folder, hub id, or toy:clip (in the package)."""
    clip_revision: str | None = None
    """Commit of the hub id; required for a hub id so that a run can be repeated."""
    diffusion: str = "toy:diffusion"
    """Stable Diffusion pipeline folder, hub id, or toy:diffusion (in the package)."""
    diffusion_revision: str | None = None


def locate(
    model_id: str, revision: str | None, setting: str, section: str = "foundation"
) -> tuple[str, dict[str, Any]]:
    """The argument for `from_pretrained`: a folder, or a pinned hub id. Errors name SECTION.SETTING."""
    if model_id.startswith("toy:"):
        model_id = str(TOY_WEIGHTS / model_id.removeprefix("toy:"))
    if os.path.isdir(model_id):
        return model_id, {"local_files_only": True}
    if model_id.startswith(("/", ".", "s3://")) or model_id.count("/") != 1:
        raise UserError(f"{section}.{setting}", model_id, "is neither a folder nor a hub id", "give an existing folder")
    if not revision:
        raise UserError(
            f"{section}.{setting}_revision", "(missing)", f"hub id {model_id} is not pinned", "give its commit hash"
        )
    return model_id, {"revision": revision}


def identity(spec: FoundationSpec, ends: tuple[str, ...] = LOADED) -> dict[str, str]:
    """What pins the foundation: for a hub id its revision, for a folder the hash of the files in it that are loaded."""
    out = {}
    for name, model_id, revision in (
        ("clip", spec.clip, spec.clip_revision),
        ("diffusion", spec.diffusion, spec.diffusion_revision),
    ):
        out[name] = model_id
        out[f"{name}_revision"] = pinned_by(model_id, revision, name, ends=ends)
    return out


def pinned_by(
    model_id: str, revision: str | None, setting: str, section: str = "foundation", ends: tuple[str, ...] = LOADED
) -> str:
    """What pins one model: of a hub id its revision, of a folder the hash of the files in it that are loaded."""
    where, _ = locate(model_id, revision, setting, section)
    return _folder_hash(Path(where), ends) if os.path.isdir(where) else str(revision)


def is_identity(spec: FoundationSpec, key: str, recorded: str | None) -> bool:
    """Whether a table or bundle records this foundation under a key of `identity`; those of before hashed less."""
    return recorded == identity(spec).get(key) or recorded == identity(spec, WEIGHTS).get(key)


def _folder_hash(folder: Path, ends: tuple[str, ...]) -> str:
    files = []
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(ends) and file.is_file():
            status = file.stat()
            files.append((file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return _hash(folder, tuple(files))


@functools.lru_cache(maxsize=64)
def _hash(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Of names and bytes; files of the same size and time are not read again."""
    digest = hashlib.sha256()
    for name, _, _ in files:
        digest.update(name.encode())
        with (folder / name).open("rb") as opened:
            while part := opened.read(2**22):
                digest.update(part)
    return digest.hexdigest()[:16]
