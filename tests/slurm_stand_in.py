"""A stand-in for Slurm that starts each node's processes on this machine: `python -m tests.slurm_stand_in srun ...`.

It knows the options that Slurm knows and our script uses, refuses others, and gives the variables that Slurm gives.
What it cannot show: other machines, cgroups, GPUs, time limits that Slurm itself keeps.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

JOB = "4711"
ROOT = Path(__file__).resolve().parent.parent


def parser(name: str, *flags: str, **valued: type) -> argparse.ArgumentParser:
    """A parser of long options only, as they are spelled, which ends with code 2 at any other."""
    made = argparse.ArgumentParser(name, allow_abbrev=False, add_help=False)
    for flag in flags:
        made.add_argument(f"--{flag}", action="store_true")
    for option, kind in valued.items():
        made.add_argument(f"--{option.replace('_', '-')}", type=kind)
    made.add_argument("rest", nargs=argparse.REMAINDER)
    return made


SRUN = parser("srun", "no-kill", nodes=int, ntasks=int, exclude=str, cpu_bind=str, kill_on_bad_exit=int, wait=int)
SBATCH = parser(
    "sbatch", "exclusive", "no-kill", "requeue", job_name=str, nodes=int, ntasks_per_node=int, mem=int, open_mode=str,
    output=str, signal=str, time=str, gpus_per_node=int,
    dependency=str,
)  # fmt: skip


def names(count: int) -> list[str]:
    """The nodes of a job."""
    return [f"node{index}" for index in range(1, count + 1)]


def srun(arguments: Sequence[str]) -> int:
    """Starts the command once for each node that is left, passes SIGTERM on, and ends with the worst exit code."""
    options = SRUN.parse_args(arguments)
    left = [name for name in os.environ["SLURM_JOB_NODELIST"].split(",") if name != options.exclude]
    assert len(left) == options.nodes == options.ntasks, "srun: Requested node configuration is not available"
    tasks = [subprocess.Popen(options.rest, env=os.environ | {"SLURMD_NODENAME": name}) for name in left]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    return max(task.wait() for task in tasks)


def scontrol(arguments: Sequence[str]) -> int:
    """`show hostnames LIST`, and `requeue JOB`, which is noted in the file requeued."""
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
    elif arguments[:1] == ["requeue"]:
        with open("requeued", "a") as file:
            print(arguments[1], file=file)
    else:
        return 1
    return 0


def options_of(script: Path) -> argparse.Namespace:
    """The options in a script's #SBATCH lines."""
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return SBATCH.parse_args([word for line in lines for word in shlex.split(line, comments=True)])


def sbatch(
    script: Path, arguments: Sequence[str], nodes: int, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a job in `folder` as its first node would, its output appended to aai-JOB.log there."""
    options = options_of(script)
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm_stand_in {name} "$@"\n')
        (programs / name).chmod(0o755)
    given = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NODELIST": ",".join(names(nodes)),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    with open(folder / options.output.replace("%j", JOB), "ab") as log:
        command = ["bash", str(script), *arguments]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        return subprocess.Popen(command, cwd=folder, env=kept | given | dict(environment or {}), stdout=log, stderr=log)


def processes(folder: Path) -> list[psutil.Process]:
    """What runs of the job that was started in `folder`, on all its nodes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_SUBMIT_DIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
