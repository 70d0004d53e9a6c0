"""Which trainings made a bundle, and from what: read off the runs that align and adapt leave in MLflow."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipelines.registry import versions
from pipelines.registry.store import must_exist
from pipelines.registry.tracking import attempt, connect, mlflow
from pipelines.registry.versions import SHA_TAG, Version
from pipelines.settings import StoreConfig, TrackingConfig

MADE, PARENTS = "made", "parents"
"""Tags of a training's run: the bundle that it wrote, and those that it began from, with spaces."""


@dataclass(frozen=True)
class TrainingRun:
    """A run of align or adapt."""

    run_id: str
    experiment: str
    stage: str
    """align or adapt, or what somebody renamed the run to."""
    status: str
    """FINISHED, or what became of it; one that broke off has read the clips too."""
    started_ms: int
    """Since 1970."""
    features: str
    """Folder or s3:// prefix of the FeatureTable, as the run was given it."""
    fingerprint: str
    """Of the FeatureTable that it read."""
    made: str
    """Content identity of the bundle; empty where none was made, or by a release that did not tell."""
    parents: tuple[str, ...]
    aligned: str = ""
    """Folder of the sounds' embeddings, of adapt."""


def trainings(cfg: StoreConfig) -> list[TrainingRun]:
    """All trainings that the store knows, the newest first; deleted ones too, since what they made may be in use."""
    must_exist(cfg)
    client, found, everything = connect(cfg), [], mlflow().entities.ViewType.ALL
    names: dict[str, str] = {}
    token = None
    while True:
        experiments = attempt(cfg, client.search_experiments, view_type=everything, page_token=token)
        names |= {each.experiment_id: each.name for each in experiments}
        token = experiments.token
        if not token:
            break
    while True:
        asked = {"run_view_type": everything, "max_results": 1000, "page_token": token}
        page = attempt(cfg, client.search_runs, list(names), "params.fingerprint LIKE '%'", **asked)
        for run in page:
            params, tags = run.data.params, run.data.tags
            if "features" in params:  # else it is somebody's own
                parents = tuple(tags.get(PARENTS, "").split())
                of = run.info.run_id, names[run.info.experiment_id], run.info.run_name, run.info.status
                told = params["features"], params["fingerprint"], tags.get(MADE, ""), parents
                found.append(TrainingRun(*of, run.info.start_time, *told, params.get("aligned", "")))
        token = page.token
        if not token:
            break
    return sorted(found, key=lambda training: -training.started_ms)


def made_by(sha: str, fingerprint: str, known: Sequence[TrainingRun]) -> list[TrainingRun]:
    """The trainings that a bundle came of, its own first, then those of the bundles that they began from.

    Of a bundle whose training did not tell what it made: all on a table of this fingerprint that told nothing.
    """
    found: list[TrainingRun] = []
    wanted = [sha] if sha else []
    while wanted:
        of = wanted.pop(0)
        for training in known:
            if training.made == of and training not in found:
                found.append(training)
                wanted += training.parents
    if not found and fingerprint:
        found = [each for each in known if each.fingerprint == fingerprint and not each.made]
    return found


def orphans(of: Sequence[TrainingRun], known: Sequence[TrainingRun]) -> list[str]:
    """Why it is not known what some of these trainings began from."""
    made = {training.made for training in known}
    told = []
    for training in of:
        for parent in training.parents:
            if parent not in made:
                began = f"{training.stage} {training.run_id} began from the bundle {parent}"
                told.append(f"{began}, which no training that is on record here says it made")
    return told


def descended(of: Sequence[TrainingRun], known: Sequence[TrainingRun]) -> list[TrainingRun]:
    """These trainings, and all that began from what they made, and so on."""
    found = list(of)
    for training in found:  # grows meanwhile
        for other in known:
            if training.made and training.made in other.parents and other not in found:
                found.append(other)
    return found


def versions_of(cfg: StoreConfig, shas: Collection[str], fingerprints: Collection[str] = ()) -> list[Version]:
    """The registered versions, of all models, of these bundles, and those trained on tables of these fingerprints."""
    found = []
    for version in all_listed(cfg):
        if version.tags.get(SHA_TAG) in shas or version.tags.get("data_fingerprint") in fingerprints:
            found.append(version)
    return found


def unexplained(cfg: StoreConfig, known: Sequence[TrainingRun], found: Sequence[Version]) -> list[str]:
    """Versions besides those found of which no training says that it made them: nobody can tell what they learned."""
    made, there, told = {each.made for each in known}, {(each.model, each.version) for each in found}, []
    for version in all_listed(cfg):
        if version.tags.get(SHA_TAG) not in made and (version.model, version.version) not in there:
            told.append(f"version {version.version} of {version.model}: no training that is on record here made it")
    return told


def all_listed(cfg: StoreConfig) -> list[Version]:
    """The versions of all registered models, by model, the newest first."""
    shared = {"uri": cfg.uri}
    found = []
    for name in versions.models(cfg):
        found += versions.listing(TrackingConfig(**shared, model_name=name))
    return found
