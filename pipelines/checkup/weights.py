"""The frozen models: whether their folders are whole, and are those that the run's tables were made with."""

import json
import os
from pathlib import Path

from aai import storage
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec, is_identity, locate, pinned_by
from pipelines.checkup.finding import Finding, failure, ok
from pipelines.checkup.places import impatient_s3

MANIFEST_BYTES = 2**20
"""No manifest of features is larger."""
RESTORE = "copy the folder anew from where it came, on every node, and compare its size"


def check_weights(spec: FoundationSpec, run_dirs: tuple[str, ...]) -> list[Finding]:
    """Looks at both models of a foundation. run_dirs: runs whose features, if there are any, name what made them."""
    recorded, found = _recorded(run_dirs)
    for name, model_id, revision in (
        ("clip", spec.clip, spec.clip_revision),
        ("diffusion", spec.diffusion, spec.diffusion_revision),
    ):
        try:
            where, _ = locate(model_id, revision, name)
        except UserError as error:
            found.append(failure("weights.folder", model_id, error.rule, f"{error.setting}: {error.remedy}"))
            continue
        if not os.path.isdir(where):
            found.append(_of_hub(where, str(revision), "config.json" if name == "clip" else "model_index.json"))
            continue
        broken = broken_files(Path(where))
        found += [failure("weights.file", f"{model_id} {file}", why, RESTORE) for file, why in broken.items()]
        if not broken:
            found += _compared(spec, name, model_id, recorded)
    return found


def broken_files(folder: Path) -> dict[str, str]:
    """The files of a model's folder that cannot be whole, and why; an empty folder is "." itself."""
    weights = sorted(folder.rglob("*.safetensors"))
    broken = {} if weights else {".": "holds no .safetensors files"}
    for file in weights:
        if why := _cut_off(file):
            broken[file.relative_to(folder).as_posix()] = why
    for file in sorted(folder.rglob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            broken[file.relative_to(folder).as_posix()] = f"is no JSON ({error})"
    return broken


def _cut_off(file: Path) -> str | None:
    """Why a safetensors file is not whole, by its header alone: its length, then names with their places."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= size - 8:
            return f"its header is not that of a safetensors file ({size} bytes)"
        try:
            header = json.loads(opened.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError):
            return "its header cannot be read"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"has {size} bytes, its header says {expected}"


def _recorded(run_dirs: tuple[str, ...]) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """What the features of each run say of their models, by their manifest; and manifests that are none."""
    impatient_s3()
    found, broken = {}, []
    for run_dir in run_dirs:
        uri = storage.join(run_dir, "features", "manifest.json")
        try:
            if uri.startswith("s3://"):  # one question to a server that is away, where reading would put several
                fs, path = storage.filesystem(uri)
                bucket, _, key = path.partition("/")
                fs.call_s3("head_object", Bucket=bucket, Key=key)
            content = storage.read_bytes(uri, MANIFEST_BYTES)
        except Exception:  # whether the place answers is another check
            continue
        try:
            found[uri] = dict(json.loads(content).get("foundation", {}))
        except (ValueError, AttributeError, TypeError):
            rule, remedy = "is not what featurize writes", "restore it, or featurize into another `out`"
            broken.append(failure("features.manifest", uri, rule, remedy))
    return found, broken


def _compared(spec: FoundationSpec, name: str, model_id: str, recorded: dict[str, dict[str, str]]) -> list[Finding]:
    """The hash of a folder beside the one that the features of each run record."""
    key = f"{name}_revision"
    found = [ok("weights.hash", model_id, pinned_by(model_id, None, name))]
    for uri, said in recorded.items():
        if said.get(name) == model_id and not is_identity(spec, key, said.get(key)):
            rule = f"{uri} was made with the hash {said.get(key)}, the folder has {found[0].found}"
            remedy = "restore the folder that made the features, or make them anew: another out of featurize"
            found.append(failure("weights.hash", model_id, rule, remedy))
    return found


def _of_hub(model_id: str, revision: str, file: str) -> Finding:
    """A hub id: fetched already, or to be fetched."""
    import requests
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model_id, file, revision=revision), str):
        return ok("weights.hub", model_id, "lies in the cache of this machine")
    remedy = "put the folder on every node and name its path (docs/clusters.md), or open the way to the hub"
    if constants.HF_HUB_OFFLINE:
        return failure("weights.hub", model_id, "is not in the cache, and HF_HUB_OFFLINE forbids fetching it", remedy)
    try:
        answer = requests.head(hf_hub_url(model_id, file, revision=revision), timeout=4, allow_redirects=True)
    except requests.RequestException as error:
        return failure("weights.hub", model_id, f"the hub does not answer ({type(error).__name__})", remedy)
    if answer.status_code >= 400:
        rule = f"the hub answers {answer.status_code} for {file} at {revision[:12]}"
        return failure("weights.hub", model_id, rule, "mend the id or the revision, or log in: HF_TOKEN")
    return ok("weights.hub", model_id, "is fetched from the hub when it is first used")
