"""The batch script of infra/slurm without a Ray: its shell, its options, what it says of mistakes, its page."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster_yaml import ROOT, shellcheck
from tests.manifest_checks import check_entrypoint
from tests.slurm_stand_in import SBATCH, options_of, sbatch
from tests.test_infra import documented

SCRIPT = ROOT / "infra" / "slurm" / "aai.sbatch"
TEXT = SCRIPT.read_text()


def test_the_script_is_sound() -> None:
    assert shellcheck(TEXT) == []
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert "SC2086" in str(shellcheck("#!/bin/bash\necho $RAY_ADDRESS\n"))


def test_the_run_is_stopped_before_slurm_kills_it() -> None:
    options = options_of(SCRIPT)
    name, _, seconds = options.signal.removeprefix("B:").partition("@")
    assert f"trap 'halt time' {name}" in TEXT
    (stop_s,) = re.findall(r"AAI_STOP_S:-(\d+)", TEXT)
    assert int(stop_s) + 60 <= int(seconds)
    assert options.requeue
    assert options.open_mode == "append"


def test_an_option_that_slurm_does_not_have_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(TEXT.replace("--requeue", "--requeueing"))
    with pytest.raises(SystemExit):
        options_of(script)


def test_nothing_secret_stands_in_an_argument() -> None:
    """The token is in the environment, never in a command line, and is not printed."""
    lines = [line for line in TEXT.splitlines() if "RAY_AUTH_TOKEN" in line]
    assert [line.split()[0].split("=")[0] for line in lines] == ["RAY_AUTH_TOKEN", "export"]


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "word"),
    [
        ((), {}, 2, "no command was given"),
        (("curate",), {"SLURM_JOB_NUM_NODES": "3"}, 1, "scontrol tells 2 of 3 nodes"),
        (("curate",), {"AAI_HEAD_IP": "203.0.113.9"}, 2, "AAI_HEAD_IP=203.0.113.9 is no address of"),
    ],
)
def test_a_mistake_is_told(
    arguments: tuple[str, ...], environment: dict[str, str], code: int, word: str, tmp_path: Path
) -> None:
    assert sbatch(SCRIPT, arguments, 2, tmp_path, environment).wait(60) == code
    assert word in (tmp_path / "aai-4711.log").read_text()


def submitted() -> list[str]:
    """The jobs that the page submits."""
    return documented((ROOT / "docs" / "vms-slurm.md").read_text().replace("\\\n", ""), "sbatch")


@pytest.mark.parametrize("line", submitted())
def test_documented_jobs_can_be_submitted(line: str) -> None:
    script, *command = SBATCH.parse_args(shlex.split(line)[1:]).rest
    assert ROOT / script == SCRIPT
    check_entrypoint(shlex.join(["aai", *command, "--address", "auto"]))


def test_jobs_are_documented_and_their_settings_too() -> None:
    assert len(submitted()) >= 2
    page = (ROOT / "docs" / "vms-slurm.md").read_text()
    assert [name for name in set(re.findall(r"\bAAI_\w+", TEXT)) if f"`{name}`" not in page] == []
