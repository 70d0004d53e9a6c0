"""What was tried with a model's aliases: the runs that every promotion, refusal and rollback leaves in MLflow."""

from typing import Any

from pipelines.registry.tracking import attempt, connect
from pipelines.settings import TrackingConfig

PROMOTION = "promotion"
"""Name of such a run."""
MOVING = "moving"
"""Its outcome from before the alias moves until all is done: a run that ended so was killed on the way, and the next
turn has finished what it began, or forgot it."""


def attempts(cfg: TrackingConfig, newest: int) -> list[dict[str, Any]]:
    """The newest attempts on a model, the newest first: turn, at, outcome, alias, version, was, by, reason.

    turn: the order in which they took place; 0 = it had none yet, or is of an older release. version 0 and was 0 stand
    for none. A run that broke off has the outcome `broke off`.
    """
    client = connect(cfg)
    experiment = attempt(cfg, client.get_experiment_by_name, cfg.experiment)
    if experiment is None:
        return []
    query = f"tags.`mlflow.runName` = '{PROMOTION}' and params.`tracking.model_name` = '{cfg.model_name}'"
    order = ["attributes.start_time DESC"]
    runs = attempt(cfg, client.search_runs, [experiment.experiment_id], query, max_results=newest, order_by=order)
    found = []
    for run in runs:
        tags, params = run.data.tags, run.data.params
        found.append(
            {
                "turn": int(tags.get("turn", 0)),
                "at": tags.get("at", "")[:16].replace("T", " "),
                "outcome": tags.get("outcome", "broke off"),
                "alias": params.get("alias", ""),
                "version": int(tags.get("version", 0)),
                "was": int(tags.get("was", 0)),
                "by": tags.get("by", ""),
                "reason": tags.get("reason", ""),
            }
        )
    # A run that waited may have begun before one that had its turn earlier; one without a turn stays where it began.
    latest, places = 0.0, {}
    for place, row in enumerate(reversed(found)):
        latest = max(latest, row["turn"])
        places[len(found) - 1 - place] = row["turn"] or latest + 0.5
    in_turn = sorted(range(len(found)), key=lambda place: (-places[place], place))
    return [found[place] for place in in_turn]
