"""The jobs of a Ray cluster.

    aai jobs                       # list them; --cluster FILE names the cluster, as for `aai submit`
    aai jobs logs ID               # show what one wrote and writes, until it ends
    aai jobs stop ID               # tell one to stop; the same command, submitted again, goes on

docs/runs.md tells of cluster files.
"""

import argparse
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from aai.errors import UserError
from pipelines.settings import Plan
from pipelines.submission.cluster_file import ClusterFile, add_cluster_flag
from pipelines.submission.jobs_api import enter
from pipelines.submit import watch

log = logging.getLogger(__name__)


class JobsConfig(ClusterFile):
    """Settings of `aai jobs`: those of a cluster file."""

    do: Literal["list", "logs", "stop"] = "list"
    """What to do."""
    job: str | None = None
    """The job that is meant, as `aai jobs` lists it."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(inputs={}, outputs={}, resources={"cluster": self.address, "do": f"{self.do} {self.job or ''}"})


CONFIG = JobsConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    add_cluster_flag(parser)
    parser.add_argument("do", nargs="?", metavar="list | logs | stop", help="what to do [list]")
    parser.add_argument("job", nargs="?", metavar="ID", help="the job")
    return {"do": "do", "job": "job"}


def run(config: JobsConfig) -> dict[str, Any]:
    """Does what was asked. Raises UserError where there is no such job, SystemExit where a followed job failed."""
    client = enter(config)
    jobs = [job for job in client.list_jobs() if job.submission_id]
    if config.do == "list":
        print(table(jobs))
        return {"jobs": len(jobs)}
    known = [job.submission_id for job in jobs]
    if config.job is None or config.job not in known:
        latest = ", ".join(known[-5:]) or "none"
        raise UserError("job", config.job or "(missing)", "is no job of this cluster", f"the latest ones: {latest}")
    if config.do == "logs":
        watch(client, config.job)
    elif client.stop_job(config.job):
        log.info("jobs: %s is being stopped", config.job)
    else:
        log.info("jobs: %s had ended", config.job)
    return {"job": config.job}


def table(jobs: list[Any]) -> str:
    """A line for each job, the latest last."""
    lines = [f"{'job':<28} {'state':<10} {'begun (UTC)':<17} {'took':>9}  {'by':<12} command"]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        begun = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
        end_ms = job.end_time or datetime.now(UTC).timestamp() * 1000
        took_s = max(0, round((end_ms - (job.start_time or end_ms)) / 1000))
        told = job.metadata or {}
        state, took = str(job.status.value).lower(), f"{took_s // 3600}:{took_s // 60 % 60:02}:{took_s % 60:02}"
        command = told.get("command", job.entrypoint)
        lines.append(f"{job.submission_id:<28} {state:<10} {begun:%Y-%m-%d %H:%M}  {took:>9}  "
                     f"{told.get('by', ''):<12} {command}".rstrip())  # fmt: skip
    return "\n".join(lines if len(lines) > 1 else [*lines, "(none yet)"])
