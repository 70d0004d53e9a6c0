"""Which trainings made a bundle, and from what: read off the runs that align and adapt leave in MLflow."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.registry import versions
from pipelines.registry.tracking import attempt, connect
from pipelines.registry.versions import SHA_TAG, Version
from pipelines.settings import StoreConfig, TrackingConfig

MADE, PARENTS = "made", "parents"
"""Tags of a training's run: the bundle that it wrote, and those that it began from, with spaces."""
STAGES = ("align", "adapt")


@dataclass(frozen=True)
class TrainingRun:
    """A run of align or adapt."""

    run_id: str
    experiment: str
    stage: str
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
    """All trainings that the store knows, the newest first."""
    client, found = connect(cfg), []
    names = {each.experiment_id: each.name for each in attempt(cfg, client.search_experiments)}
    for stage in STAGES:
        query, token = f"tags.`mlflow.runName` = '{stage}'", None
        while True:
            page = attempt(cfg, client.search_runs, list(names), query, max_results=1000, page_token=token)
            for run in page:
                params, tags = run.data.params, run.data.tags
                if "features" in params and "fingerprint" in params:  # else it is somebody's own of the same name
                    told = params["features"], params["fingerprint"], tags.get(MADE, "")
                    of = run.info.run_id, names[run.info.experiment_id], stage, run.info.status, run.info.start_time
                    parents = tuple(tags.get(PARENTS, "").split())
                    found.append(TrainingRun(*of, *told, parents, params.get("aligned", "")))
            token = page.token
            if not token:
                break
    return sorted(found, key=lambda training: -training.started_ms)


def made_by(sha: str, fingerprint: str, known: Sequence[TrainingRun]) -> list[TrainingRun]:
    """The trainings that a bundle came of, its own first, then those of the bundles that they began from.

    Of a bundle whose training did not tell what it made: all finished ones on a table of this fingerprint.
    """
    found: list[TrainingRun] = []
    wanted = [sha]
    while wanted:
        of = wanted.pop(0)
        for training in known:
            if training.made == of and training not in found:
                found.append(training)
                wanted += training.parents
    if not found and fingerprint:
        done = [each for each in known if each.status == "FINISHED" and not each.made]
        found = [each for each in done if each.fingerprint == fingerprint]
    return found


def descended(of: Sequence[TrainingRun], known: Sequence[TrainingRun]) -> list[TrainingRun]:
    """These trainings, and all that began from what they made, and so on."""
    found = list(of)
    for training in found:  # grows meanwhile
        for other in known:
            if training.made and training.made in other.parents and other not in found:
                found.append(other)
    return found


def versions_of(cfg: TrackingConfig, shas: Sequence[str], fingerprints: Sequence[str] = ()) -> list[Version]:
    """The registered versions of these bundles, and those trained on tables of these fingerprints."""
    found = []
    for version in versions.listing(cfg):
        if version.tags.get(SHA_TAG) in shas or version.tags.get("data_fingerprint") in fingerprints:
            found.append(version)
    return found
