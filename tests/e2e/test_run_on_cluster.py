"""N2: `aai run` on a cluster of three nodes with a token, while nodes die in every stage, and the head once."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from aai import storage
from tests.surroundings import free_port, ray_node

ROOT = Path(__file__).resolve().parents[2]
STAGES: dict[str, list[str]] = {
    "curate": ["rows_per_shard=16"],
    "featurize": ["batch_size=4"],
    "align": ["fit.steps=30", "fit.batch_size=16", "fit.checkpoint_every=5"],
    "adapt": ["fit.steps=20", "fit.batch_size=16", "fit.checkpoint_every=5"],
    "evaluate": ["pictures={caption: 8, sound: 8, ceiling: 8}", "max_frames=40", "disturbed_clips=4"],
    "promote": ["gates=[{metric: retrieval.overlap, max: 0}]"],
}
HEAD = re.compile(r"^\[\d+/\d+\] (\w+): (?!unchanged)", re.MULTILINE)


def chain(folder: Path, world: Path, **more: list[str]) -> Path:
    """The config of a run in a folder, on clips that are there; more: settings by stage, besides those above."""
    stages: list[dict[str, Any]] = [
        {"verb": verb, "config": f"configs/demo/{verb}.yaml", "set": [*settings, *more.get(verb, [])]}
        for verb, settings in STAGES.items()
    ]
    stages[0]["set"] += [f"manifest={world}/manifest.csv"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "stages": stages, "attempts": 5}))
    return file


class Run:
    """`aai run` in a process of its own, and what it says."""

    def __init__(self, file: Path, *words: str) -> None:
        self.log = file.parent / "log"
        command = [sys.executable, "-m", "pipelines", "run", "--config", str(file), *words]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def stage(self) -> str | None:
        """The stage that it is at."""
        found = HEAD.findall(self.log.read_text())
        return str(found[-1]) if found and self.process.poll() is None else None

    def wait_for(self, stage: str) -> bool:
        """Until a stage has begun, or the run has ended: whether it has begun."""
        while self.process.poll() is None and self.stage() != stage:
            time.sleep(0.2)
        return self.stage() == stage

    def ended(self) -> int:
        """The exit code, with what it said if that is not 0."""
        code = self.process.wait(timeout=1500)
        assert code == 0, self.log.read_text()[-4000:]
        return code


def rows(folder: Path, name: str) -> dict[str, Any]:
    """A table of a run, without where it lies and who wrote it."""
    table = storage.read_table(str(folder / "run" / name))
    table = table.drop_columns([column for column in ("message",) if column in table.column_names])
    return dict(table.sort_by("clip_id").replace_schema_metadata(None).to_pydict())


def tables(folder: Path) -> dict[str, Any]:
    """All tables of a run."""
    return {name: rows(folder, name) for name in ("curated/accepted", "curated/rejected", "features")}


def figures(folder: Path) -> dict[str, float]:
    """What the run came to."""
    evaluated = storage.read_json(str(folder / "run" / "evaluate" / "evaluate.json"))
    return {
        "same_object_r1": evaluated["retrieval"]["same_object_r1"],
        "object": evaluated["generation"]["sound"]["object"],
        "loss": storage.read_json(str(folder / "run" / "align" / "align.json"))["metrics"].get("val_loss", 0.0),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a world of clips, the folder of a run on this machine that nothing disturbed)."""
    from aai.toy.writer import write_world

    base = tmp_path_factory.mktemp("n2")
    write_world(str(base / "world"), 120, seed=3, progress=False)
    Run(chain(base / "whole", base / "world")).ended()
    return base / "world", base / "whole"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a world of clips, the folder of an undisturbed run whose model is not promoted yet)."""
    from aai.toy.writer import write_world

    base = tmp_path_factory.mktemp("n2-evaluated")
    write_world(str(base / "world"), 120, seed=3, progress=False)
    Run(chain(base / "whole", base / "world"), "--until", "evaluate").ended()
    return base / "world", base / "whole"


class Nodes:
    """A head, where the commands run, and nodes for their workers that are killed; all want a token."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.workers = stack, list[psutil.Process]()
        self.address = stack.enter_context(ray_node(None, None, "--num-cpus", "0"))

    def raylets(self) -> set[psutil.Process]:
        """Those of this cluster."""
        port = self.address.rpartition(":")[2]
        mine = re.compile(rf"--gcs-address=\S*:{port}$")
        every = [one for one in psutil.process_iter(["name", "cmdline"]) if one.info["name"] == "raylet"]
        return {one for one in every if any(mine.match(word) for word in one.info["cmdline"] or ())}

    def add(self) -> None:
        """One more node."""
        before = self.raylets()
        self.stack.enter_context(ray_node(self.address, None, "--num-cpus", "2"))
        self.workers += self.raylets() - before

    def kill_the_oldest(self) -> None:
        """SIGKILL to the raylet of a node of workers, which ends with it."""
        self.workers.pop(0).kill()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster of three nodes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    with ExitStack() as stack:
        found = Nodes(stack)
        for _ in range(2):
            found.add()
        assert len(found.workers) == 2
        yield found


@pytest.mark.accept
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after_s", [4.0, 9.0, 15.0])
def test_n2_a_node_dies_in_every_stage(
    undisturbed: tuple[Path, Path], nodes: Nodes, tmp_path: Path, after_s: float
) -> None:
    world, whole = undisturbed
    run, struck = Run(chain(tmp_path / "struck", world), "--address", nodes.address), {}
    for verb in STAGES:
        if not run.wait_for(verb):
            continue
        time.sleep(after_s)
        struck[verb] = run.stage() == verb
        nodes.kill_the_oldest()
        nodes.add()
    run.ended()
    print(f"a node died {after_s:g} s after the beginning of", [verb for verb, was in struck.items() if was])
    print("undisturbed:", figures(whole), "struck:", figures(tmp_path / "struck"))
    assert tables(tmp_path / "struck") == tables(whole)
    promoted = storage.read_json(str(tmp_path / "struck" / "run" / "promote" / "promote.json"))
    assert (promoted["version"], promoted["alias"]) == (1, "champion")
    again = Run(tmp_path / "struck" / "run.yaml", "--address", nodes.address)
    again.ended()
    assert "done: none; unchanged: curate, featurize, align, adapt, evaluate, promote" in again.log.read_text()


@pytest.mark.accept
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after_s", [1.0, 2.0, 3.0])
def test_n2_a_node_dies_while_a_model_is_promoted(
    evaluated: tuple[Path, Path], nodes: Nodes, tmp_path: Path, after_s: float
) -> None:
    """The shortest stage, on a run that has come so far undisturbed, and was moved."""
    world, whole = evaluated
    shutil.copytree(whole / "run", tmp_path / "struck" / "run")
    run = Run(chain(tmp_path / "struck", world), "--address", nodes.address)
    assert run.wait_for("promote")
    time.sleep(after_s)
    at = run.stage()
    nodes.kill_the_oldest()
    nodes.add()
    run.ended()
    print(f"a node died {after_s:g} s after the beginning of promote, when it was at", at)
    assert at == "promote"
    assert "done: promote; unchanged: curate, featurize, align, adapt, evaluate" in run.log.read_text()
    promoted = storage.read_json(str(tmp_path / "struck" / "run" / "promote" / "promote.json"))
    assert (promoted["version"], promoted["alias"]) == (1, "champion")


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_n2_the_head_dies_and_comes_back(
    undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, whole = undisturbed
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    port = str(free_port())
    with ExitStack() as stack:
        address = stack.enter_context(ray_node(None, None, "--num-cpus", "2", "--port", port))
        address = f"{address.rpartition(':')[0]}:{port}"
        run = Run(chain(tmp_path / "struck", world), "--address", address)
        assert run.wait_for("align")
        time.sleep(25)
        at = run.stage()
        stack.close()  # the head is gone, with all that ran on it
        time.sleep(30)
        stack.enter_context(ray_node(None, None, "--num-cpus", "2", "--port", port))
        run.ended()
    print("the head died in", at, figures(tmp_path / "struck"), "undisturbed:", figures(whole))
    assert "it goes on in" in run.log.read_text()
    assert tables(tmp_path / "struck") == tables(whole)
