"""The registry of bundles in MLflow: versions, their tags, and the aliases that name them.

A registered version is an MLflow model whose data is the bundle folder, loaded by `pipelines.pyfunc_model`: it works
with `mlflow.pyfunc.load_model` and holds no pickle. Aliases: see docs/promotion.md.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aai import storage
from aai.bundle import read_bundle
from aai.errors import UserError
from pipelines.registry.figures import as_text, numbers
from pipelines.registry.tracking import OpenRun, attempt, connect, mlflow, run, unless
from pipelines.settings import StoreConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SHA_TAG = "bundle_sha"
TURNS = "-turns"
"""End of the name of the registered model in which a server keeps the turns of another."""
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def register(
    cfg: TrackingConfig,
    bundle_folder: str | Path,
    metrics: Mapping[str, Any],
    tags: Mapping[str, Any],
    anew: bool = False,
) -> int:
    """Registers a bundle and returns its version; a bundle of the same content keeps the version it has, unless `anew`.

    The files are copied into the artifact store. `tags` and the metrics come with a new version; one that exists keeps
    its own. Raises UserError for a broken bundle or an unreachable server.
    """
    bundle = read_bundle(bundle_folder)
    client = connect(cfg)
    version = None if anew else find_version(cfg, bundle.sha)
    if version is None:
        with run(cfg, "register", {"bundle": str(bundle_folder)}, {SHA_TAG: bundle.sha}) as opened:
            opened.log_metrics(metrics)
            model_id = _log_model(opened, bundle.folder)
            exists = "RESOURCE_ALREADY_EXISTS"
            attempt(cfg, unless, exists, client.create_registered_model, cfg.model_name)
            # The tags are part of the creation: a version without them cannot be left behind by a kill.
            described = {**tags, "metrics": numbers(metrics), SHA_TAG: bundle.sha}
            made = attempt(
                cfg,
                client.create_model_version,
                cfg.model_name,
                f"models:/{model_id}",
                opened.run_id,
                tags={key: as_text(value) for key, value in described.items()},
                await_creation_for=60,
                model_id=model_id,
            )
            version = int(made.version)
    return version


def _log_model(opened: OpenRun, folder: Path) -> str:
    """Stores the bundle as an MLflow model of the run; returns the model's id."""
    library = mlflow()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    inputs = [ColSpec("binary", "audio"), ColSpec("string", "prompt", False), ColSpec("long", "seed", False)]
    signature = ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec("binary", "png")]))
    with warnings.catch_warnings(), library.start_run(run_id=opened.run_id):
        warnings.filterwarnings("ignore", message=".*input example.*")  # the signature says it all
        info = library.pyfunc.log_model(
            name="bundle",
            loader_module="pipelines.pyfunc_model",
            data_path=str(folder),
            signature=signature,
            pip_requirements=["aai"],
        )
    return str(info.model_id)


def find_version(cfg: TrackingConfig, sha: str) -> int | None:
    """The newest registered version of a bundle by its content, or None."""
    found = [int(version.version) for version in _all_versions(cfg) if version.tags.get(SHA_TAG) == sha]
    return max(found, default=None)


@dataclass(frozen=True)
class Version:
    """A registered version."""

    model: str
    version: int
    created_ms: int
    """Since 1970."""
    aliases: tuple[str, ...]
    tags: dict[str, str]


def listing(cfg: TrackingConfig) -> list[Version]:
    """All versions of the model, the newest first; empty when there is no such model."""
    named: dict[int, list[str]] = {}
    for alias, version in sorted(aliases(cfg, cfg.model_name).items()):
        named.setdefault(version, []).append(alias)
    found = []
    for each in _all_versions(cfg):
        number = int(each.version)
        found.append(
            Version(cfg.model_name, number, each.creation_timestamp, tuple(named.get(number, ())), dict(each.tags))
        )
    return sorted(found, key=lambda version: -version.version)


def models(cfg: StoreConfig) -> list[str]:
    """The names of all registered models, without those that only keep turns."""
    client, names, token = connect(cfg), [], None
    while True:
        page = attempt(cfg, client.search_registered_models, max_results=100, page_token=token)
        names += [model.name for model in page if not model.name.endswith(TURNS)]
        token = page.token
        if not token:
            return sorted(names)


def _all_versions(cfg: TrackingConfig) -> "Iterator[ModelVersion]":
    client, query = connect(cfg), f"name = '{cfg.model_name}'"
    token: str | None = ""
    while token is not None:
        page = attempt(cfg, client.search_model_versions, query, 1000, page_token=token or None)
        yield from page
        token = page.token or None


def set_version_tags(cfg: TrackingConfig, version: int, tags: Mapping[str, Any]) -> None:
    """Writes tags on a registered version; structures become JSON."""
    client = connect(cfg)
    for key, value in tags.items():
        attempt(cfg, client.set_model_version_tag, cfg.model_name, str(version), key, as_text(value)[:100_000])


def version_tags(cfg: TrackingConfig, version: int) -> dict[str, str]:
    """The tags of a registered version."""
    return dict(_version(connect(cfg), cfg, cfg.model_name, str(version)).tags)


def may_be_used(uri: str, cfg: StoreConfig) -> bool:
    """Whether the gates of a version, given as models:/NAME/VERSION, have passed or were forced."""
    _, name, version, _ = pin_bundle(uri, cfg)
    tags = _version(connect(cfg), cfg, name, version).tags
    return "true" in (tags.get("gates_passed"), tags.get("forced"))


def _version(client: "MlflowClient", cfg: StoreConfig, name: str, version: str) -> "ModelVersion":
    found = attempt(cfg, unless, "RESOURCE_DOES_NOT_EXIST", client.get_model_version, name, version)
    if found is None:
        uri = f"models:/{name}/{version}"
        raise UserError("bundle", uri, f"no such version in {cfg.uri}", "see the versions in `mlflow ui`")
    return found


def _model(cfg: StoreConfig, name: str) -> "RegisteredModel | None":
    return attempt(cfg, unless, "RESOURCE_DOES_NOT_EXIST", connect(cfg).get_registered_model, name)


def model_tags(cfg: TrackingConfig) -> dict[str, str]:
    """The tags of the registered model; empty when there is no such model."""
    model = _model(cfg, cfg.model_name)
    return dict(model.tags) if model else {}


def set_model_tag(cfg: TrackingConfig, key: str, value: str) -> None:
    """Writes a tag on the registered model (up to 100,000 characters)."""
    attempt(cfg, connect(cfg).set_registered_model_tag, cfg.model_name, key, value)


def delete_model_tag(cfg: TrackingConfig, key: str) -> None:
    """Removes a tag from the registered model; it may be absent."""
    attempt(cfg, connect(cfg).delete_registered_model_tag, cfg.model_name, key)


def aliases(cfg: StoreConfig, name: str) -> dict[str, int]:
    """All aliases of a registered model and their versions; empty when there is no such model."""
    model = _model(cfg, name)
    return {alias: int(version) for alias, version in model.aliases.items()} if model else {}


def get_alias(cfg: TrackingConfig, alias: str) -> int | None:
    """The version an alias names, or None."""
    return aliases(cfg, cfg.model_name).get(alias)


def set_alias(cfg: TrackingConfig, alias: str, version: int) -> None:
    """Points an alias at a version, in one step."""
    attempt(cfg, connect(cfg).set_registered_model_alias, cfg.model_name, alias, str(version))


def delete_alias(cfg: TrackingConfig, alias: str) -> None:
    """Removes an alias; it may be absent."""
    attempt(cfg, connect(cfg).delete_registered_model_alias, cfg.model_name, alias)


def pin_bundle(uri: str, cfg: StoreConfig) -> tuple[str, str, str, str]:
    """A bundle's URI that cannot move, with model name, version and alias ("" where there is none).

    `models:/NAME@ALIAS` becomes `models:/NAME/VERSION`; a folder or s3:// prefix is returned as it is. Raises UserError
    when there is no such model, version or alias; the aliases that exist are named.
    """
    if not uri.startswith("models:"):
        return uri, "", "", ""
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise UserError("bundle", uri, "is not a registry URI", "write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match["name"], match["alias"] or "", match["version"] or ""
    if alias:
        known = aliases(cfg, name)
        if alias not in known:
            shown = ", ".join(f"{a} (version {v})" for a, v in sorted(known.items())) or "none"
            remedy = f"aliases of {name}: {shown}; promote a bundle first, or check tracking.uri"
            raise UserError("bundle", uri, f"no alias {alias!r} of model {name!r} in {cfg.uri}", remedy)
        version = str(known[alias])
    return f"models:/{name}/{version}", name, version, alias


def resolve_bundle(uri: str, cfg: StoreConfig, into: str | None = None) -> str:
    """The local folder of a bundle given as models:/NAME@ALIAS, models:/NAME/VERSION, folder or s3:// prefix.

    A registered bundle's content is compared with what was registered. into: folder it is fetched to, else one that
    stays. Raises UserError, of the setting `bundle` where the version's files are not what they were.
    """
    pinned, name, number, _ = pin_bundle(uri, cfg)
    if not name:
        return storage.local_folder(uri)
    version = _version(connect(cfg), cfg, name, number)
    found = list(_fetched(pinned, cfg, into).glob("data/*/meta.json"))
    if len(found) != 1:
        raise UserError("bundle", uri, "the registered version holds no bundle", "register it with `aai promote`")
    bundle = read_bundle(found[0].parent)
    if bundle.sha != (expected := version.tags.get(SHA_TAG)):
        rule = f"its files have the identity {bundle.sha}, registered was {expected}"
        raise UserError("bundle", uri, rule, "the artifact store was changed: promote the bundle again")
    return str(bundle.folder)


def _fetched(uri: str, cfg: StoreConfig, into: str | None) -> Path:
    """The files of a registered version. Raises UserError when the artifact store has them no more."""
    download, gone = mlflow().artifacts.download_artifacts, "RESOURCE_DOES_NOT_EXIST"
    try:
        folder = attempt(cfg, unless, gone, download, artifact_uri=uri, dst_path=into)
    except FileNotFoundError:  # a store that is a folder
        folder = None
    except OSError as error:
        raise UserError("bundle", uri, f"its files cannot be fetched ({error})", "try again") from error
    if folder is None:
        raise UserError("bundle", uri, "its files are gone from the artifact store", "promote the bundle again")
    return Path(folder)
