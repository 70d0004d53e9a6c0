"""Looks for what would stop a run: versions, GPUs, Ray and its doors, S3, MLflow, disks, clocks, models, configs.

    aai doctor                                             # this machine, for the demo
    aai doctor configs/align/vggsound_vitl14_gpu8.yaml --address auto
    aai doctor curate=mine.yaml --json                     # a config of your own, for the command that stands before it
    aai doctor --config configs/doctor/vggsound_vitl14.yaml --address auto   # all of a run

Prints a table with a remedy for each finding; docs/runbook.md explains each. Nothing it tries stays behind but a
deleted run in MLflow. Exit code 0: nothing would stop the run (warnings may stand there); 2: something would.
"""

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

import pydantic

from aai.errors import UserError
from pipelines.__main__ import VERBS, config_file, load_config
from pipelines.checkup.finding import SECRET_NAME, Finding, as_json, as_table, failure, ok, warning
from pipelines.checkup.needs import Needs, Service, address_of, needs_of
from pipelines.checkup.nodes import Asked, check_cluster, check_here, variables_set
from pipelines.checkup.places import check_place
from pipelines.checkup.running import Check, run_checks
from pipelines.checkup.trackers import check_tracker
from pipelines.checkup.weights import check_weights
from pipelines.settings import Plan, RayVerbConfig

log = logging.getLogger(__name__)


class DoctorConfig(RayVerbConfig):
    """What is looked at, and what counts as enough. Of `cluster` only the address matters."""

    configs: tuple[str, ...] = ()
    """Config files of the run, as FILE in a folder that is named like the command, or VERB=FILE. What they name is
    looked at: folders, buckets, registry, models, cluster."""
    run_dir: str = ""
    """Folder or s3:// prefix of the run, in place of the one in `configs`; empty = theirs."""
    timeout_s: float = pydantic.Field(15, gt=0, le=600)
    """When whatever has not ended is given up, and reported."""
    max_skew_s: float = pydantic.Field(10, gt=0)
    """How far clocks may differ: locks are taken over after 60 s without a sign of life."""
    min_free_gb: float = pydantic.Field(5, ge=0)
    """Disk that should be free for Ray on every node, and for folders that are written."""
    json_output: bool = False
    """Print JSON in place of the table."""

    def files(self) -> dict[str, Path]:
        """The config files by command. Raises UserError where a file does not say for which."""
        found = {}
        for given in self.configs:
            verb, named, name = given.partition("=") if "=" in given else ("", "", given)
            file = config_file(name)
            guesses = [verb] if named else [file.stem, file.parent.name]
            known = [guess for guess in guesses if guess in VERBS]
            if not known:
                remedy = f"write it as VERB=FILE; VERB is one of {', '.join(VERBS)}"
                raise UserError("configs", given, "does not say of which command it is", remedy)
            found[known[0]] = file
        return found

    def plan(self) -> Plan:
        """See VerbConfig."""
        inputs = {verb: str(file) for verb, file in self.files().items()}
        resources = {"cluster": self.cluster.address or "this machine", "time": f"at most {self.timeout_s:g} s"}
        return Plan(inputs=inputs, outputs={}, resources=resources)


CONFIG = DoctorConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("files", nargs="*", metavar="[VERB=]FILE", help="config files of the run")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    parser.add_argument("--timeout-s", type=float, metavar="S", help="when a check is given up [15]")
    return {"files": "configs", "json": "json_output", "timeout_s": "timeout_s"}


def run(config: DoctorConfig) -> dict[str, Any]:
    """Looks at everything at once and prints what it found. Raises UserError when something would stop the run."""
    begin_s = time.monotonic()
    files = config.files()
    needs = needs_of(files, config.run_dir or None)
    rows = check_services(needs.services) + run_checks(checks_of(config, files, needs), config.timeout_s)
    seconds = time.monotonic() - begin_s
    print(as_json(rows, seconds) if config.json_output else as_table(rows))
    bad = list(dict.fromkeys(row.check for row in rows if row.state == "failure"))
    counts = {state: sum(row.state == state for row in rows) for state in ("ok", "warning", "failure")}
    log.info("doctor: %d rows in %.1f s: %s", len(rows), seconds, ", ".join(f"{n} {s}" for s, n in counts.items()))
    if bad:
        rule = f"{counts['failure']} findings would stop the run, or do harm"
        raise UserError("doctor", ", ".join(bad), rule, "do what stands behind each arrow; docs/runbook.md explains it")
    return {**counts, "findings": [row.model_dump() for row in rows]}


def checks_of(config: DoctorConfig, files: dict[str, Path], needs: Needs) -> list[Check]:
    """Everything that is looked at."""
    local = {folder for folder in needs.written if not folder.startswith("s3://")}
    models = {id_: id_ for spec in needs.foundations for id_ in (spec.clip, spec.diffusion) if Path(id_).is_dir()}
    asked = Asked(
        variables=variables_set() if len(local) < len(needs.written) else (),
        paths=tuple(str(Path(folder).absolute()) for folder in sorted(local) if Path(folder).exists()),
        models=tuple(models.items()),
        max_skew_s=config.max_skew_s,
        min_free_gb=config.min_free_gb,
        timeout_s=0.6 * config.timeout_s,
    )
    address = address_of(config.cluster, needs)
    if address:
        checks = [Check(f"cluster {address}", check_cluster, (address, asked, needs.clusters))]
    else:
        checks = [Check("this machine", check_here, (asked, needs.clusters))]
    for uri, is_written in [*((uri, True) for uri in needs.written), *((uri, False) for uri in needs.read)]:
        checks.append(Check(uri, check_place, (uri, is_written, config.max_skew_s, config.min_free_gb)))
    checks += [Check(f"MLflow {store.uri}", check_tracker, (store, config.max_skew_s)) for store in needs.stores]
    checks += [Check(f"foundation {spec.clip}", check_weights, (spec, needs.written)) for spec in needs.foundations]
    if files:
        # The code of the commands is much to load: a busy machine may not be done with it, which is no fault of theirs.
        remedy = "aai VERB --config FILE --dry-run looks at one; so does --timeout-s 60 here"
        late = warning("config", ", ".join(files), "not looked at in time: this machine is busy", remedy)
        checks.append(Check("configs", check_configs, (files, config.run_dir), late))
    return checks


def check_configs(files: dict[str, Path], run_dir: str) -> list[Finding]:
    """Whether each file is one that its command takes."""
    found = []
    for verb, file in files.items():
        words = ["--config", str(file), *(["--set", f"run_dir={run_dir}"] if run_dir else [])]
        try:
            load_config(verb, words)
        except UserError as error:
            what = error.rule if SECRET_NAME.search(error.setting) else f"{error.value}: {error.rule}"
            found.append(failure("config", f"{verb} {file}", f"{error.setting}={what}", error.remedy))
        else:
            found.append(ok("config", f"{verb} {file}", "is valid"))
    return found


def check_services(services: tuple[Service, ...]) -> list[Finding]:
    """Whether a service that others can reach has a key."""
    found = []
    for service in services:
        if service.host in ("127.0.0.1", "localhost", "::1") or service.keys_file or os.environ.get("AAI_API_KEY"):
            found.append(ok("service.key", service.host, "is guarded by a key, or for this machine alone"))
        else:
            remedy = "set AAI_API_KEY (openssl rand -hex 32), or keys_file; or host=127.0.0.1"
            found.append(failure("service.key", service.host, "others can reach it, and it has no key", remedy))
    return found
