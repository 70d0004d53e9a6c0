"""How well the tests catch: small changes of a module, each run against the module's own test file.

    python -m tests.mutation --sample 360 --seed 1 --out runs/mutation.json

cosmic-ray makes the mutants. They run here rather than by its own command, because most of a test file's time is the
import of torch, transformers and diffusers: one process imports them once and is forked for each mutant.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "aai/adapt.py",
    "aai/align.py",
    "aai/concepts.py",
    "aai/conditions.py",
    "aai/encoders/aligner.py",
    "aai/features.py",
    "aai/fit.py",
    "aai/grading.py",
    "aai/inject.py",
    "aai/losses.py",
    "aai/metrics.py",
    "aai/painter.py",
    "pipelines/evaluation/cases.py",
    "pipelines/evaluation/clips.py",
    "pipelines/evaluation/grades.py",
    "pipelines/evaluation/judges.py",
    "pipelines/evaluation/listening.py",
)
COPIED = ("aai", "pipelines", "tests", "configs", "pyproject.toml")
LONGEST_S = 300.0
OVER_TIME = -9


@dataclass(frozen=True)
class Mutant:
    """One change of one module: the `occurrence`-th place of an operator of cosmic-ray."""

    module: str
    operator: str
    occurrence: int
    line: int
    column: int

    def source(self) -> str:
        """The module's text with the change."""
        text = (ROOT / self.module).read_text(encoding="utf-8")
        changed = mutate_code(text, get_operator(self.operator)(), self.occurrence)
        assert changed is not None
        return str(changed)

    def describe(self) -> dict[str, Any]:
        """Where the change is, and the line before and after it."""
        before = (ROOT / self.module).read_text(encoding="utf-8").splitlines()
        after = self.source().splitlines()
        changed = [i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
        at = changed[0] if changed else self.line - 1
        return {**asdict(self), "before": before[at].strip(), "after": after[at].strip()}


def mirror(module: str) -> str:
    """The test file of a module: aai/toy/writer.py -> tests/aai/toy/test_writer.py."""
    path = Path(module)
    return f"tests/{path.parent.as_posix()}/test_{path.name}"


def annotations(text: str) -> set[tuple[int, int]]:
    """(line, column) of every operator inside a type annotation: a change there changes no behaviour."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is None:
                continue
            lines = text.splitlines()
            for line in range(part.lineno, part.end_lineno + 1):
                first = part.col_offset if line == part.lineno else 0
                last = part.end_col_offset if line == part.end_lineno else len(lines[line - 1])
                found |= {(line, column) for column in range(first, last)}
    return found


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module, but for those of type annotations."""
    text = (ROOT / module).read_text(encoding="utf-8")
    skipped = annotations(text)
    nodes = list(ast_nodes(get_ast(text)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            continue  # replaces variables that one has to name
        operator, occurrence = kind(), 0
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                if (line, column) not in skipped:
                    yield Mutant(module, name, occurrence, line, column)
                occurrence += 1


def draw(modules: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """A seeded sample with at most one mutant of a place.

    An arithmetic sign can be changed in eleven ways, a truth value in one: drawn from all mutants, signs would be
    nearly the whole sample.
    """
    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for module in modules:
        for mutant in mutants(module):
            places[(module, mutant.line, mutant.column)].append(mutant)
    rng = random.Random(seed)
    chosen = rng.sample(sorted(places), min(count, len(places)))
    return sorted((rng.choice(places[place]) for place in chosen), key=lambda m: (m.module, m.line, m.column))


class Runner:
    """A copy of the repository in which a module can be replaced and its test file run, in a fork of this process."""

    def __init__(self, folder: str | Path, limits_s: dict[str, float] | None = None) -> None:
        """limits_s: seconds that a module's test file may take, as `check` finds them."""
        self.folder, self.limits_s = Path(folder), dict(limits_s or {})
        self.folder.mkdir(exist_ok=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                # The committed weights are most of the bytes and never change.
                shutil.copytree(source, self.folder / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
            else:
                shutil.copy(source, self.folder / name)
        for weights in ROOT.glob("aai/**/weights"):
            (self.folder / weights.relative_to(ROOT)).symlink_to(weights)

    def warm(self, modules: Sequence[str]) -> None:
        """Imports what the test files import, for all forks to come."""
        for module in modules:
            importlib.import_module(mirror(module).removesuffix(".py").replace("/", "."))

    def check(self, module: str) -> float:
        """Seconds of the test file on the unchanged module. Raises RuntimeError when it fails."""
        start = time.monotonic()
        code, output = self._run(module, LONGEST_S)
        if code != 0:
            raise RuntimeError(f"{mirror(module)} fails on the unchanged module:\n{output[-3000:]}")
        seconds = time.monotonic() - start
        self.limits_s[module] = 10 + 4 * seconds
        return seconds

    def outcome(self, module: str, source: str) -> str:
        """What the module's test file says of `source` in the module's place: survived, killed or over time."""
        file = self.folder / module
        original = file.read_text(encoding="utf-8")
        try:
            file.write_text(source, encoding="utf-8")
            code, _ = self._run(module, self.limits_s.get(module, LONGEST_S))
        finally:
            file.write_text(original, encoding="utf-8")
        return {0: "survived", OVER_TIME: "over time"}.get(code, "killed")

    def _run(self, module: str, limit_s: float) -> tuple[int, str]:
        """Exit status (OVER_TIME when it was stopped) and output of a module's test file."""
        log = self.folder / "output.txt"
        child = os.fork()
        if child == 0:
            self._enter(mirror(module), log)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)  # with the processes that the tests started
        os.waitpid(child, 0)
        return OVER_TIME, ""

    def _enter(self, test_file: str, log: Path) -> None:
        """The forked process: runs pytest in the copy and ends."""
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            # Our own packages are imported anew, from the copy.
            for name in [name for name in sys.modules if name.split(".")[0] in ("aai", "pipelines", "tests")]:
                del sys.modules[name]
            sys.path.insert(0, str(self.folder))
            os.environ["PYTHONPATH"] = str(self.folder)
            os.environ["AAI_TINY_MODELS"] = str(self.folder / "tiny")  # the first session makes them
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True  # a file changed twice within a second would be taken from the cache
            importlib.invalidate_caches()
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of a short file's time
            options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not accept and not gpu"]
            code = int(pytest.main([*options, test_file]))
        finally:
            os._exit(code)


def run(sample: Sequence[Mutant], folder: Path, limits_s: dict[str, float], workers: int) -> list[str]:
    """The outcome of each mutant, found by so many processes, each with a copy of its own."""
    processes = []
    for number in range(workers):
        process = os.fork()
        if process == 0:
            _work(sample[number::workers], folder / str(number), limits_s, hidden=number > 0)
        processes.append(process)
    failed = [process for process in processes if os.waitpid(process, 0)[1] != 0]
    if failed:
        raise RuntimeError(f"{len(failed)} of {workers} processes failed; their errors stand above")
    outcomes = [""] * len(sample)
    for number in range(workers):
        outcomes[number::workers] = json.loads((folder / str(number) / "outcomes.json").read_text())
    return outcomes


def _work(part: Sequence[Mutant], folder: Path, limits_s: dict[str, float], hidden: bool) -> None:
    """One process of `run`: leaves its outcomes in its folder and ends."""
    code = 1
    try:
        runner, outcomes = Runner(folder, limits_s), []
        for mutant in tqdm(part, unit="mutant", file=sys.stderr, disable=hidden):
            outcomes.append(runner.outcome(mutant.module, mutant.source()))
            if outcomes[-1] == "survived":
                tqdm.write(f"survived: {json.dumps(mutant.describe())}", file=sys.stderr)
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, runs and reports; returns what it writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--sample", type=int, default=360, help="mutants to run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/mutation.json"))
    parser.add_argument("modules", nargs="*", help="files to change (default: those of docs/testing.md)")
    options = parser.parse_args(arguments)
    modules = options.modules or MODULES
    sample = draw(modules, options.sample, options.seed)
    with tempfile.TemporaryDirectory(prefix="aai-mutation-") as folder:
        runner = Runner(Path(folder) / "check")
        runner.warm(modules)
        seconds = {module: round(runner.check(module), 1) for module in modules}
        outcomes = run(sample, Path(folder), runner.limits_s, options.workers)
    report = {"seed": options.seed, **summary(sample, outcomes), "test_file_s": seconds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    share = report["share_killed"]
    print(f"{share:.1%} of {len(sample)} mutants killed; the survivors are listed in {options.out}")
    return report


def summary(sample: Sequence[Mutant], outcomes: Sequence[str]) -> dict[str, Any]:
    """Counts as a whole and by module, and the mutants that survived."""
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, outcome in zip(sample, outcomes, strict=True):
        by_module[mutant.module][outcome] += 1
    survived = [m.describe() for m, outcome in zip(sample, outcomes, strict=True) if outcome == "survived"]
    return {
        "mutants": len(sample),
        "share_killed": round(1 - len(survived) / max(1, len(sample)), 4),
        "over_time": outcomes.count("over time"),
        "by_module": {module: dict(counts) for module, counts in by_module.items()},
        "survivors": survived,
    }


if __name__ == "__main__":
    main()
