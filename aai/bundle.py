"""The bundle: the folder that is trained, registered, promoted and served. Text and safetensors, no pickle.

    config.yaml  aligner.safetensors  [adapter.safetensors]  meta.json  [model.sig]

`meta.json` is the seal: it names every other file with its SHA-256, and the foundation that was trained on. `model.sig`
says who made it (`aai.signatures`).
"""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from aai import storage
from aai.config import Config
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec, identity, is_identity
from aai.sampling import DEFAULT_PROMPT, HEAD_PATTERN
from aai.signatures import SIGNATURE, SigningConfig, sign
from aai.version import code_version

VERSION = 1
CONFIG_FILE, ALIGNER_FILE, ADAPTER_FILE, META_FILE = (
    "config.yaml",
    "aligner.safetensors",
    "adapter.safetensors",
    "meta.json",
)
HASHED = (CONFIG_FILE, ALIGNER_FILE, ADAPTER_FILE)
REQUIRED = (CONFIG_FILE, ALIGNER_FILE, META_FILE)
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
MLFLOW_FILES = ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta")
"""What MLflow may lay beside a bundle; nothing of it is read."""
KNOWN = (*REQUIRED, ADAPTER_FILE, SIGNATURE, *MLFLOW_FILES)
META_TYPES = {"created_at": str, "files": dict, "foundation": dict, "metrics": dict, "parents": list}


class BundleConfig(Config):
    """Everything needed to build the modules that the weights of a bundle belong to."""

    foundation: FoundationSpec
    encoder: dict[str, Any]
    """Settings of the audio encoder (`aai.encoders.audio`)."""
    adapter: dict[str, Any] | None = None
    """Settings of the adapter (`aai.adapt`); empty in a bundle that was only aligned."""
    vocabulary: dict[str, Any] | None = None
    """Words for what pictures show (`aai.concepts`), used to edit and stylize."""
    neutral_word: str = "thing"
    """The word that stands in the prompt where a sound has strength 0."""
    prompt: str = DEFAULT_PROMPT
    """The prompt that the adapter was trained in where a caption has no head of its own; painting's default."""
    head_pattern: str = HEAD_PATTERN
    """What a caption says that cannot be heard: it stayed text in front of <sound> when the adapter was trained."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on this machine whose files have been checked."""

    folder: Path
    config: BundleConfig
    meta: dict[str, Any]
    """version, created_at (UTC), written_by (the code; older ones lack it), files {name: SHA-256}, foundation,
    data_fingerprint, metrics, parents."""

    @property
    def sha(self) -> str:
        """Identity by content, 16 hex digits: config, weights, foundation, data; not date, metrics, place."""
        content = {key: self.meta.get(key) for key in ("version", "files", "foundation", "data_fingerprint")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def aligner(self) -> dict[str, Tensor]:
        """The trained audio encoder's state dict, on the CPU."""
        return load_file(self.folder / ALIGNER_FILE)

    def adapter(self) -> dict[str, Tensor]:
        """The audio adapter's state dict, on the CPU. Raises UserError for a bundle that was only aligned."""
        if ADAPTER_FILE not in self.meta["files"]:
            rule = f"has no {ADAPTER_FILE}: it was only aligned"
            raise UserError("bundle", self.folder, rule, "give the bundle of `aai adapt`")
        return load_file(self.folder / ADAPTER_FILE)

    def verify_foundation(self) -> None:
        """Raises UserError when other weights than in training lie under the foundation's recorded names."""
        for key, recorded in self.meta["foundation"].items():
            if not is_identity(self.config.foundation, key, recorded):
                raise UserError(
                    f"foundation.{key}",
                    identity(self.config.foundation).get(key),
                    f"the bundle was trained on {recorded}",
                    "put the recorded weights there, or train the bundle again",
                )


def write_bundle(
    folder: str | Path,
    config: BundleConfig,
    aligner: dict[str, Tensor],
    adapter: dict[str, Tensor] | None,
    meta: dict[str, Any],
) -> Bundle:
    """Writes a bundle in one step and reads it back; an older bundle in its place is replaced.

    folder: local folder or s3:// prefix. meta: `data_fingerprint` (str), `metrics` (dict), `parents` (list of
    bundle shas) and what else is plain JSON; version, date, hashes and the foundation's identity are added.
    Raises UserError for weights that are not finite, and for a place that holds something else than a bundle.
    """
    if (adapter is None) != (config.adapter is None):
        rule = "settings and weights of the adapter must come together"
        raise UserError("bundle.adapter", config.adapter, rule, "give both or none")
    target = str(folder)
    _refuse_foreign(target)
    on_s3 = target.startswith("s3://")
    local = Path(storage.absolute(target))
    parent = storage.temporary_folder() if on_s3 else local.parent
    parent.mkdir(parents=True, exist_ok=True)
    name = f".{local.name}.{uuid.uuid4().hex[:8]}"
    fresh, old = parent / f"{name}.new", parent / f"{name}.old"
    try:
        _write_files(fresh, config, aligner, adapter, meta)
        if on_s3:
            _upload(fresh, target)
            return read_bundle(fresh)
        # A folder cannot be renamed over another: for a moment none is there, but never half of one.
        if local.exists():
            local.rename(old)
        fresh.rename(local)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not on_s3:
            shutil.rmtree(fresh, ignore_errors=True)
    return read_bundle(local)


def read_bundle(uri: str | Path) -> Bundle:
    """Opens a bundle (a local folder, or an s3:// prefix, copied here) and checks all files by name and hash.

    Raises UserError that names the file, the rule it breaks and the remedy.
    """
    uri = str(uri)
    names = _names(uri)
    if not names or names == [""]:  # nothing, or a file
        raise UserError("bundle", uri, "no such bundle folder", "give the folder that `aai align` or `aai adapt` wrote")
    _check_names(uri, names)  # before anything is copied or read
    folder = Path(storage.local_folder(uri))
    meta = _read_meta(uri, folder)
    _check_hashes(uri, folder, meta["files"])
    config = _read_config(uri, folder)
    if (config.adapter is None) != (ADAPTER_FILE not in meta["files"]):
        rule = f"{CONFIG_FILE} and {ADAPTER_FILE} disagree on whether there is an adapter"
        raise UserError("bundle", uri, rule, "write the bundle again")
    return Bundle(folder, config, meta)


def sign_bundle(uri: str, config: SigningConfig) -> str:
    """Signs a bundle where it lies (local or s3://); returns who did (`aai.signatures.signer_of`).

    Raises UserError for a broken bundle, or a key that cannot sign; what was signed before stays so.
    """
    bundle = read_bundle(uri)
    by = sign(bundle.folder, config)
    if uri.startswith("s3://"):  # what was signed is a copy
        storage.write_bytes(storage.join(uri, SIGNATURE), (bundle.folder / SIGNATURE).read_bytes())
    return by


def _write_files(
    folder: Path,
    config: BundleConfig,
    aligner: dict[str, Tensor],
    adapter: dict[str, Tensor] | None,
    meta: dict[str, Any],
) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    _save(folder / ALIGNER_FILE, aligner)
    if adapter is not None:
        _save(folder / ADAPTER_FILE, adapter)
    sealed = {
        "data_fingerprint": "",
        "metrics": {},
        "parents": [],
        **meta,
        "version": VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": code_version(),
        "foundation": identity(config.foundation),
        "files": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
    }
    storage.write_json(str(folder / META_FILE), sealed)


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(path.stem, name, "holds NaN or infinite weights", "lower the learning rate")
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}, path)


def _upload(folder: Path, uri: str) -> None:
    """The seal is removed first and written last: nobody can read half a bundle."""
    storage.remove(storage.join(uri, META_FILE))
    storage.remove(uri)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == META_FILE):
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())


def _names(uri: str) -> list[str]:
    """The names of all files under a folder or prefix, relative to it."""
    base = storage.filesystem(uri)[1].rstrip("/")
    return [storage.filesystem(file)[1].removeprefix(base).lstrip("/") for file in storage.list_files(uri)]


def _refuse_foreign(uri: str) -> None:
    """A wrong path must not cost anybody their files: only a bundle (or part of one) is replaced."""
    for name in _names(uri):
        if name not in KNOWN:
            raise UserError("bundle", uri, f"holds {name}: it is not a bundle", "give a new folder")


def _check_names(uri: str, names: list[str]) -> None:
    for name in names:
        if name.lower().endswith(PICKLE_SUFFIXES):
            rule = f"{name} may hold a pickle, which can run code"
            raise UserError("bundle", uri, rule, "remove it; weights belong into safetensors")
        if name not in KNOWN:
            rule = f"{name} does not belong into a bundle"
            raise UserError("bundle", uri, rule, "remove it, or give the folder of a bundle")
    for name in REQUIRED:
        if name not in names:
            raise UserError("bundle", uri, f"{name} is missing", "copy the whole folder, or write it again")


def _read_config(uri: str, folder: Path) -> BundleConfig:
    """Plain YAML: a bundle from elsewhere gets no `${...}` resolved, which could read the environment."""
    try:
        data = yaml.safe_load((folder / CONFIG_FILE).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("bundle", uri, f"{CONFIG_FILE} is not YAML", "write the bundle again") from error
    return BundleConfig.parse(data, source=f"{uri}/{CONFIG_FILE}")


def _read_meta(uri: str, folder: Path) -> dict[str, Any]:
    remedy = "write the bundle again with `aai align` or `aai adapt`"
    try:
        meta = storage.read_json(str(folder / META_FILE))
    except ValueError as error:
        raise UserError("bundle", uri, f"{META_FILE} is not JSON ({error})", remedy) from error
    if not isinstance(meta, dict):
        raise UserError("bundle", uri, f"{META_FILE} is not a JSON object", remedy)
    if meta.get("version") != VERSION:
        rule = f"{META_FILE} has version {meta.get('version')}, this code reads version {VERSION}"
        raise UserError("bundle", uri, rule, remedy)
    for key, kind in META_TYPES.items():
        if not isinstance(meta.get(key), kind):
            raise UserError("bundle", uri, f"{META_FILE} lacks {key!r} ({kind.__name__})", remedy)
    return meta


def _check_hashes(uri: str, folder: Path, recorded: dict[str, str]) -> None:
    present = {name for name in HASHED if (folder / name).exists()}
    for name in sorted(present ^ set(recorded)):
        state = "is not named in" if name in present else "is missing but named in"
        raise UserError("bundle", uri, f"{name} {state} {META_FILE}", "copy the whole folder again")
    for name, expected in recorded.items():
        if (found := _sha256(folder / name)) != expected:
            rule = f"{name} has SHA-256 {found[:16]}.., {META_FILE} says {expected[:16]}.."
            raise UserError("bundle", uri, rule, "it was changed or damaged: copy or write it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
