"""Ray's jobs API, entered with a token, with errors that say what to do; a job's log as it is written."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aai.errors import UserError
from pipelines.checkup import doors
from pipelines.checkup.finding import ray_token
from pipelines.submission.cluster_file import ClusterFile

log = logging.getLogger(__name__)

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STARTS_S = 90.0
"""How long a cluster that has just started is given to take a job."""
WAKES_S = 15.0
"""How long one that takes connections may say nothing."""
AWAY_S = 300.0
"""How long a head that does not answer is waited for while a job is followed."""


def enter(cluster: ClusterFile) -> Any:
    """A `ray.job_submission.JobSubmissionClient`. Raises UserError where nobody answers, or everybody is let in."""
    parts = urlsplit(cluster.address)
    door = doors.Door("dashboard", parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    headers = None
    if parts.scheme == "http" and _knock(cluster, door) == "guarded":  # https: a gateway, with rules of its own
        headers = {"Authorization": f"Bearer {ray_token()}"}  # Ray's client has one only under RAY_AUTH_MODE=token
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(cluster.address, verify=cluster.ca_file or True, headers=headers)
    except Exception as error:
        raise refused(cluster, error) from error


def _knock(cluster: ClusterFile, door: doors.Door) -> doors.Answer:
    """How the door answers who may enter. Raises UserError where nobody may, or everybody."""
    answer, begin_s = doors.ask(door), time.monotonic()
    while answer == "silent" and time.monotonic() - begin_s < WAKES_S:  # a dashboard that has just been started
        answer = doors.ask(door)
    if answer in ("closed", "silent", "other"):
        words = {"closed": "nobody listens there", "silent": "takes connections and says nothing, or they get lost"}
        rule = words.get(answer, "what listens there is no dashboard of Ray")
        remedy = (
            "give the dashboard's address in a cluster file (docs/runs.md), or start a cluster (`ray start --head`); "
            "on Kubernetes: kubectl port-forward service/NAME-head-svc 8265"
        )
        raise UserError("address", cluster.address, rule, remedy)
    if answer == "open" and not doors.is_loopback(door.host):
        raise UserError("address", cluster.address, "takes jobs from everybody who reaches it", doors.GUARD)
    if answer == "guarded" and ray_token() is None:
        raise UserError("address", cluster.address, "wants a token, and there is none here", doors.GIVE)
    if answer == "guarded" and doors.ask(door, ray_token()) != "open":
        raise UserError("address", cluster.address, "refuses the token of this machine", doors.GIVE)
    return answer


def send(client: Any, **job: Any) -> str:
    """Submits a job; its id. A cluster that has just started takes some seconds until it can take one."""
    begin_s = time.monotonic()
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() - begin_s > STARTS_S:
                raise
        time.sleep(2.0)


def refused(cluster: ClusterFile, error: Exception) -> UserError:
    """What the jobs API would not do."""
    reason = str(error).strip().split("\n")[0][:300]
    return UserError("address", cluster.address, f"refused ({reason})", "see `aai jobs`, and docs/runs.md")


class JobLog:
    """Passes a job's log on as it grows; what was passed on is not repeated after a head was away for a while."""

    def __init__(self, client: Any, job: str, write: Callable[[str], None]) -> None:
        self.client, self.job, self.write = client, job, write
        self.shown = 0
        """Characters of the log that were passed on."""

    def details(self) -> Any:
        """Follows the job until it has ended; its last details. Raises what the client raises after AWAY_S of it."""
        away_since = None
        while True:
            try:
                asyncio.run(self._tail())
                details = self.client.get_job_info(self.job)
                away_since = None
                if details.status in ENDED:
                    return details
            except Exception as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_S:
                    raise
                log.debug("job %s: %s", self.job, error)
            time.sleep(1.0)

    async def _tail(self) -> None:
        seen = 0
        async for text in self.client.tail_job_logs(self.job):
            new = text[max(0, self.shown - seen) :]
            seen += len(text)
            if new:
                self.write(new)
                self.shown = seen


def exit_code(details: Any) -> int:
    """What a command that was run as a job ends with here: as it did there, 130 where it was stopped, else 1."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return 130
    return int(details.driver_exit_code or 1)
