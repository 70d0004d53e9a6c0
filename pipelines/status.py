"""Where a run stands: each stage not begun, running, broken off or finished, how far it is, and what comes next.

    aai status                        # runs/demo
    aai status s3://bucket/runs/mine  # from any machine that reads the folder
    aai status --json                 # for programs

It reads the run's folder alone (listings, locks, small files), starts nothing, and takes no lock.
"""

import argparse
import json
from typing import Any

from aai import storage
from pipelines.overview.stage_states import FOLDERS, read_stages
from pipelines.overview.state_text import as_lines, next_command
from pipelines.settings import Plan, VerbConfig


class StatusConfig(VerbConfig):
    """Which run is looked at: `run_dir`."""

    json_output: bool = False
    """Print JSON in place of the table."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        places = {stage: storage.join(self.run_dir, folder) for stage, folder in FOLDERS.items()}
        return Plan(inputs=places, outputs={}, resources={"machine": "this one, one process"})


CONFIG = StatusConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """RUN_DIR and the flag, each with the setting it stands for."""
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="folder or s3:// prefix of the run [runs/demo]")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    return {"run_dir": "run_dir", "json": "json_output"}


def run(config: StatusConfig) -> dict[str, Any]:
    """Prints where the run stands; returns it. Raises UserError for a folder of something else."""
    run_dir = config.run_dir.rstrip("/")
    stages = read_stages(run_dir)
    told = next_command(stages, run_dir, any(stage.stage == "world" for stage in stages))
    result = {"run_dir": run_dir, "stages": [stage.model_dump() for stage in stages], "next": told}
    if config.json_output:
        print(json.dumps(result, indent=1))
        return result
    begun = any(stage.state != "not begun" for stage in stages)
    for line in (f"{run_dir}{'' if begun else ': nothing is there yet'}", *as_lines(stages), f"next: {told}"):
        print(line)
    return result
