"""What the configs of a run need of their surroundings, read without the code that runs them (seconds of imports)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from aai import storage
from aai.config import Config
from aai.foundation.identity import FoundationSpec
from pipelines.settings import ClusterConfig, TrackingConfig, TrainClusterConfig, VerbConfig

INPUTS = ("manifest", "media_root", "input", "features", "clips", "bundle", "evaluation")
"""Settings that name what a command reads, in all commands that have them."""
TRACKED, FROZEN = ("align", "adapt", "evaluate", "promote"), ("featurize", "align")
"""Commands that have a tracking store, and frozen models, whether or not their file names them."""
T = TypeVar("T", bound=Config)


class Service(Config):
    """How a service would be reached."""

    host: str = "127.0.0.1"
    keys_file: str | None = None


class Needs(Config):
    """What is to be looked at, each once."""

    written: tuple[str, ...] = ()
    """Folders and s3:// prefixes: the run's, and outputs elsewhere."""
    read: tuple[str, ...] = ()
    """Inputs that the run does not make itself: those outside its folder."""
    stores: tuple[TrackingConfig, ...] = ()
    foundations: tuple[FoundationSpec, ...] = ()
    clusters: Mapping[str, TrainClusterConfig] = {}
    """By command."""
    services: tuple[Service, ...] = ()


def needs_of(files: Mapping[str, Path], run_dir: str | None = None) -> Needs:
    """The needs of config files by command. What a file has wrong is left out here: checking it is another's work."""
    written, read, stores, foundations, services = [], [], [], [], []
    clusters: dict[str, TrainClusterConfig] = {}
    for verb, file in files.items():
        values = _values(file, run_dir)
        base = str(values.get("run_dir", VerbConfig.model_fields["run_dir"].default)).rstrip("/")
        out = values.get("out")
        written += [base, *([out] if isinstance(out, str) and not within(out, base) else [])]
        for name in INPUTS:
            uri = values.get(name)
            if isinstance(uri, str) and not uri.startswith("models:") and not within(uri, base):
                read.append(uri)
        stores += _section(TrackingConfig, values.get("tracking", {} if verb in TRACKED else None))
        foundations += _section(FoundationSpec, values.get("foundation", {} if verb in FROZEN else None))
        scores = values.get("scores")
        foundations += _section(FoundationSpec, scores.get("foundation") if isinstance(scores, dict) else None)
        if found := _section(TrainClusterConfig, values.get("cluster")):
            clusters[verb] = found[0]
        if verb == "serve":
            services += _section(Service, {name: values[name] for name in ("host", "keys_file") if name in values})
    one_each = {(store.uri, store.experiment): store for store in reversed(stores)}
    return Needs(
        written=tuple(dict.fromkeys(written)),
        read=tuple(dict.fromkeys(read)),
        stores=tuple(one_each.values()),
        foundations=tuple(dict.fromkeys(foundations)),
        clusters=clusters,
        services=tuple(services),
    )


def within(uri: str, folder: str) -> bool:
    """Whether a file or folder is another one or lies in it."""
    here, there = storage.absolute(uri).rstrip("/"), storage.absolute(folder).rstrip("/")
    return here == there or here.startswith(f"{there}/")


def address_of(cluster: ClusterConfig, needs: Needs) -> str | None:
    """The Ray cluster that is meant: the one given, else the one that a config names."""
    named = [found.address for found in needs.clusters.values() if found.address]
    return cluster.address or (named[0] if named else None)


def _values(file: Path, run_dir: str | None) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(file)
        if run_dir is not None:
            OmegaConf.update(loaded, "run_dir", run_dir)
        found = OmegaConf.to_container(loaded, resolve=True)
    except Exception:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _section(kind: type[T], given: object) -> list[T]:
    """A section as its class reads it; keys that are another class's are left out."""
    if not isinstance(given, dict):
        return []
    try:
        return [kind.model_validate({key: value for key, value in given.items() if key in kind.model_fields})]
    except ValueError:
        return []
