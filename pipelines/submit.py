"""Runs a command as a job of a Ray cluster elsewhere: packs, sends, shows its log, and ends as the job ends.

    aai submit curate --config mine/curate.yaml                          # the cluster of configs/demo/submit.yaml
    aai submit run --config configs/run/vggsound_vitl14_gpu8.yaml --cluster infra/clusters/kubernetes.yaml
    aai submit --detach align --config mine/align.yaml --set fit.steps=2000
    aai jobs                                                             # what became of them

All but --cluster, --detach and --dry-run is the command's own. Its settings are checked here first. Ctrl-C asks whether
the job is to stop or to go on; when this machine goes away, the job goes on. docs/runs.md tells of cluster files.
"""

import argparse
import getpass
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from aai.errors import UserError
from aai.version import code_version
from pipelines.run import RunConfig
from pipelines.settings import Plan, RayVerbConfig, VerbConfig
from pipelines.submission.cluster_file import ClusterFile, add_cluster_flag
from pipelines.submission.jobs_api import ENDED, JobLog, enter, exit_code, refused, send
from pipelines.submission.parcel import digest_of, entrypoint, pack

log = logging.getLogger(__name__)

OWN_FLAGS = ("--detach", "--dry-run", "-h", "--help")
OWN_OPTIONS = ("--cluster",)
NOT_HERE = ("submit", "jobs", "demo", "serve", "bench")
"""Commands that are for this machine, or do not end."""


class SubmitConfig(ClusterFile):
    """Settings of `aai submit`: those of a cluster file."""

    command: tuple[str, ...] = pydantic.Field((), exclude=True)
    """The command and its arguments."""
    detach: bool = False
    """Do not wait for the job."""

    def split(self) -> tuple[str, list[str]]:
        """(command, its arguments). Raises UserError where it is none that a job can be."""
        from pipelines.__main__ import VERBS

        if not self.command:
            raise UserError("command", "(missing)", "nothing to submit", "write it as aai submit VERB [--config FILE]")
        verb, *words = self.command
        if verb not in VERBS or verb in NOT_HERE:
            fit = ", ".join(name for name in VERBS if name not in NOT_HERE)
            raise UserError("command", verb, "is not a command that a job can be", f"one of: {fit}")
        return verb, words

    def plan(self) -> Plan:
        """See VerbConfig."""
        told = {"cluster": self.address, "variables": ", ".join(self.environment()) or "none"}
        if not self.command:
            return Plan(inputs={}, outputs={}, resources=told)
        verb, words = self.split()
        with tempfile.TemporaryDirectory() as folder:
            config = pack(self, verb, words, Path(folder))
            files = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())
        line = entrypoint(self, verb, words, takes_address(config))
        sent = ", ".join(files) if len(files) <= 8 else f"{len(files)} files"
        return Plan(inputs={"sent along": sent or "nothing"}, outputs={"job": line}, resources=told)


CONFIG = SubmitConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    add_cluster_flag(parser)
    parser.add_argument("--detach", action="store_true", help="do not wait for the job")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...", help="the command and its arguments")
    return {"command": "command", "detach": "detach"}


def arranged(argv: Sequence[str]) -> list[str]:
    """The arguments with our own ones first, wherever they stood; from VERB on, all others are the command's."""
    own, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word in OWN_OPTIONS:
            own += [word, *words[:1]]
            del words[:1]
        elif word in OWN_FLAGS or word.startswith(tuple(f"{name}=" for name in OWN_OPTIONS)):
            own.append(word)
        else:
            rest.append(word)
    return [*own, *rest]


def run(config: SubmitConfig) -> dict[str, Any]:
    """Sends the command and follows it; returns {job}. Raises SystemExit with the job's exit code where it failed.

    A job that is the same and runs already is followed: who lost its way to one comes back to it by the same command.
    """
    verb, words = config.split()
    with tempfile.TemporaryDirectory() as folder:
        of_verb = pack(config, verb, words, Path(folder))
        variables, client = config.environment(), enter(config)
        on_ray = takes_address(of_verb)
        line = entrypoint(config, verb, words, on_ray)
        told = {"command": " ".join(["aai", verb, *words]), "by": whoami(), "code": code_version()}
        told["digest"] = digest_of(Path(folder), line)
        try:
            job = running(client, told["digest"]) or send(
                client,
                entrypoint=line,
                runtime_env={"working_dir": folder, "env_vars": variables},
                metadata=told,
                entrypoint_num_cpus=config.driver_cpus,
                entrypoint_num_gpus=0 if on_ray else config.driver_gpus,
            )
        except Exception as error:
            raise refused(config, error) from error
    log.info("submit: job %s on %s", job, config.address)
    if config.detach:
        log.info("submit: `aai jobs logs %s` shows what it does, `aai jobs stop %s` ends it", job, job)
        return {"job": job}
    watch(client, job)
    return {"job": job}


def running(client: Any, digest: str) -> str | None:
    """The job of this digest that has not ended; None where there is none."""
    for job in client.list_jobs():
        if job.submission_id and job.status not in ENDED and (job.metadata or {}).get("digest") == digest:
            log.info("submit: it runs already, since another `aai submit` of the same command")
            return str(job.submission_id)
    return None


def whoami() -> str:
    """Who submits."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return "unknown"


def takes_address(config: VerbConfig) -> bool:
    """Whether a command is told on which Ray to work."""
    return isinstance(config, RayVerbConfig | RunConfig)


def watch(client: Any, job: str) -> None:
    """Shows a job's log until it ends. Raises SystemExit where it did not end well."""
    follower = JobLog(client, job, write)
    while True:
        try:
            details = follower.details()
            break
        except KeyboardInterrupt:
            if not goes_on(client, job):
                raise
    if not follower.shown:  # Ray passes no log on that has bytes other than UTF-8 near its begin
        log.warning("submit: its log could not be shown; on the head it is job-driver-%s.log among Ray's logs", job)
    if details.status == "SUCCEEDED":
        log.info("submit: job %s succeeded", job)
        return
    reason = str(details.message or "").split(", last available logs")[0].strip().split("\n")[0]
    log.error("submit: job %s %s: %s", job, str(details.status.value).lower(), reason)
    raise SystemExit(exit_code(details))


def goes_on(client: Any, job: str) -> bool:
    """Asks what Ctrl-C is to do with a job; whether it is followed further."""
    told = f"job {job} goes on; `aai jobs logs {job}` shows it, `aai jobs stop {job}` ends it"
    if not sys.stdin.isatty():
        log.info("\nsubmit: %s", told)
        return False
    try:
        answer = input("\nStop the job (s), leave it to itself (Enter), or go on watching (w)? ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.startswith("s"):
        client.stop_job(job)
        log.info("submit: job %s is being stopped", job)
        return True
    if not answer.startswith("w"):
        log.info("submit: %s", told)
    return answer.startswith("w")


def write(text: str) -> None:
    """Passes a piece of a job's log on."""
    sys.stdout.write(text)
    sys.stdout.flush()
