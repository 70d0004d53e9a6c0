"""Runs of MLflow below another one: the trials of a sweep."""

import logging

from pipelines.registry.tracking import OpenRun

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow shows a run below another."""


def end_children(parent: OpenRun) -> int:
    """Marks the runs below `parent` that still run as KILLED, and returns how many: their processes are gone.

    A server that is away is no error: only the mark is lost.
    """
    ended = 0
    try:
        experiment = parent.client.get_run(parent.run_id).info.experiment_id
        query = f"tags.`{PARENT}` = '{parent.run_id}' and attributes.status = 'RUNNING'"
        while found := parent.client.search_runs([experiment], query, max_results=100):
            for run in found:
                parent.client.set_terminated(run.info.run_id, "KILLED")
                ended += 1
    except Exception as error:  # the sweep is done, or goes on: it must not end by this
        log.warning("MLflow was not told which trials were stopped (%s)", error)
    return ended
