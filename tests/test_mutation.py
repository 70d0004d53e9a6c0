"""The mutation run's own parts, and a small run of it."""

from pathlib import Path

import pytest

from tests import mutation


def test_each_module_has_the_test_file_of_its_name() -> None:
    assert mutation.mirror("aai/toy/writer.py") == "tests/aai/toy/test_writer.py"
    missing = [module for module in mutation.MODULES if not (mutation.ROOT / mutation.mirror(module)).is_file()]
    assert missing == []


def test_annotations_are_not_mutated() -> None:
    text = "def f(a: int | None, b: int = 1 | 2) -> (\n    int | str\n):\n    c: int | None = 3 | 4\n    return c\n"
    skipped = mutation.annotations(text)
    lines = text.splitlines()
    bars = [(n + 1, i) for n, line in enumerate(lines) for i, sign in enumerate(line) if sign == "|"]
    assert [bar in skipped for bar in bars] == [True, False, True, True, False]


def test_a_sample_is_seeded_and_has_one_mutant_of_a_place() -> None:
    modules = ["aai/losses.py", "aai/grading.py"]
    every = mutation.draw(modules, 10_000, 1)
    places = {(m.module, m.line, m.column) for m in every}
    assert len(places) == len(every) >= 30
    assert places == {(m.module, m.line, m.column) for module in modules for m in mutation.mutants(module)}
    some = mutation.draw(modules, 10, 1)
    assert some == mutation.draw(modules, 10, 1) != mutation.draw(modules, 10, 2)
    assert len(some) == 10
    for mutant in some:
        told = mutant.describe()
        assert told["before"] != told["after"]
        assert (mutation.ROOT / mutant.module).read_text().splitlines()[told["line"] - 1].strip() == told["before"]


@pytest.mark.accept
def test_a_small_run_finds_what_lives_and_what_dies(tmp_path: Path) -> None:
    report = mutation.main(["--sample", "6", "--out", str(tmp_path / "mutation.json"), "aai/grading.py"])
    assert report["mutants"] == 6
    assert report["share_killed"] >= 0.5
    runner = mutation.Runner(tmp_path / "copy", {"aai/grading.py": 20.0})
    text = (mutation.ROOT / "aai/grading.py").read_text()
    endless = text.replace("    return float(1000", "    while True:\n        pass\n    return float(1000")
    assert runner.outcome("aai/grading.py", text + "\n# a comment changes nothing\n") == "survived"
    assert runner.outcome("aai/grading.py", text.replace("all(r[a]", "any(r[a]")) == "killed"
    assert runner.outcome("aai/grading.py", endless) == "over time"


def test_the_summary_counts() -> None:
    sample = mutation.draw(["aai/losses.py", "aai/grading.py"], 4, 1)
    report = mutation.summary(sample, ["killed", "survived", "over time", "killed"])
    assert report["share_killed"] == 0.75
    assert report["over_time"] == 1
    assert [survivor["line"] for survivor in report["survivors"]] == [sample[1].line]
    assert sum(sum(counts.values()) for counts in report["by_module"].values()) == report["mutants"] == 4
