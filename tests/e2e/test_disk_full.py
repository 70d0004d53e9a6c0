"""Disks that are full in the middle of a stage: a clear end, nothing torn, and the same command goes on.

The disks are file systems in memory of a few MB; mounting them wants root.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.training.following import history
from tests.e2e.test_run_on_cluster import ROOT, Run, chain, rows

STEPS = 60


class Disk:
    """A disk of its own at a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words, str(self.folder)], check=True)

    def resize(self, mb: float) -> None:
        """So much fits on it from now on."""
        self._mount("-o", f"remount,size={int(mb * 1024)}k")

    def free(self) -> int:
        """Bytes."""
        about = os.statvfs(self.folder)
        return about.f_bavail * about.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small one."""
    found = Disk(tmp_path / "small")
    yield found
    subprocess.run(["umount", str(found.folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run until align that had all the room; its clips lie beside it."""
    from aai.toy.writer import write_world

    base = tmp_path_factory.mktemp("full")
    write_world(str(base / "world"), 120, seed=3, progress=False)
    Run(chain(base / "whole", base / "world", align=[f"fit.steps={STEPS}"]), "--until", "align").ended()
    return base / "whole"


def aai(verb: str, *sets: str) -> tuple[int, str]:
    """(exit code, what it said) of a command with the demo's config."""
    words = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-m", "pipelines", verb, "--config", f"configs/demo/{verb}.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


def told_of(code: int, said: str, folder: Path) -> str:
    """The one line of the end: it must name the folder and say what to do."""
    last = said.rstrip().split("\n")[-1]
    assert code == 2, said[-3000:]
    assert f": error: disk={folder}" in last, said[-3000:]
    assert "No space left" in last
    assert "make room there" in last
    return last


@pytest.mark.accept
@pytest.mark.timeout(900)
def test_n9_curate_on_a_disk_that_is_full_in_either_half(whole: Path, disk: Disk) -> None:
    run = disk.folder / "run"
    sets = f"manifest={whole.parent}/world/manifest.csv", f"run_dir={run}", "rows_per_shard=16"
    sets = (*sets, f"tracking.uri=sqlite:///{disk.folder.parent}/mlflow.db")
    kept: dict[Path, bytes] = {}
    for mb in (3, 7):  # the disk is full while clips are measured, then while the tables are written
        disk.resize(mb)
        print(f"{mb} MB:", told_of(*aai("curate", *sets), run / "curated"))
        files = {file: file.read_bytes() for file in run.rglob("*.parquet")}
        assert all(pq.read_table(file).num_rows >= 0 for file in files), "torn"
        assert kept.items() <= files.items(), "what was written is gone"
        assert list(run.rglob(".*.tmp")) == []
        kept = files
        print(f"{len(files)} whole tables, {disk.free()} bytes free")
    disk.resize(64)
    code, said = aai("curate", *sets)
    assert code == 0, said[-3000:]
    assert "shards are there already" in said
    for name in ("curated/accepted", "curated/rejected"):
        assert rows(disk.folder, name) == rows(whole, name)


@pytest.mark.accept
@pytest.mark.timeout(900)
def test_n9_align_on_a_disk_that_is_full_at_a_checkpoint(whole: Path, disk: Disk) -> None:
    out = disk.folder / "align"
    sets = f"run_dir={whole}/run", f"out={out}", f"fit.steps={STEPS}", "fit.batch_size=16", "fit.checkpoint_every=5"
    sets = (*sets, f"tracking.uri=sqlite:///{disk.folder.parent}/mlflow.db")
    disk.resize(11)  # two checkpoints
    print("11 MB:", told_of(*aai("align", *sets), out / "_checkpoints"))
    came_to = max(entry["step"] for entry in history(str(out)))
    disk.resize(64)
    code, said = aai("align", *sets)
    assert code == 0, said[-3000:]
    print(f"after step {came_to} of {STEPS} with more room")
    assert [entry["loss"] for entry in history(str(out)) if "loss" in entry] == [
        entry["loss"] for entry in history(str(whole / "run" / "align")) if "loss" in entry
    ]
    ours, theirs = (folder / "bundle" / "aligner.safetensors" for folder in (out, whole / "run" / "align"))
    assert ours.read_bytes() == theirs.read_bytes()
