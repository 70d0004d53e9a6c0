"""Runs of MLflow below another one: the trials of a sweep."""

import logging
from collections.abc import Collection

from pipelines.registry.tracking import OpenRun

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow shows a run below another."""


TRIAL = "trial"
"""The tag with a trial's number, as its folder is called."""


def end_children(parent: OpenRun, stopped: Collection[str] = ()) -> int:
    """Marks the runs below `parent` that still run as KILLED, and returns how many: their processes are gone.

    stopped: trials that were stopped early, which are KILLED too: one that dies may have called itself FAILED, by the
    error of a worker that died before it. A server that is away is no error: only the mark is lost.
    """
    ended = 0
    try:
        experiment = parent.client.get_run(parent.run_id).info.experiment_id
        below = f"tags.`{PARENT}` = '{parent.run_id}'"
        asked = [f"{below} and attributes.status = 'RUNNING'"]
        asked += [f"{below} and tags.`{TRIAL}` = '{trial}' and attributes.status = 'FAILED'" for trial in stopped]
        for query in asked:
            while found := parent.client.search_runs([experiment], query, max_results=100):
                for run in found:
                    parent.client.set_terminated(run.info.run_id, "KILLED")
                    ended += 1
    except Exception as error:  # the sweep is done, or goes on: it must not end by this
        log.warning("MLflow was not told which trials were stopped (%s)", error)
    return ended
