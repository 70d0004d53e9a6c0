"""Checks that answer, hang, die and raise, side by side."""

import os
import sys
import time

from pipelines.checkup.finding import Finding, ok, warning
from pipelines.checkup.running import Check, run_checks


def fine(word: str) -> list[Finding]:
    print("to the terminal")
    return [ok("fine", word, "is fine")]


def hang() -> list[Finding]:
    time.sleep(600)
    return []


def work() -> list[Finding]:
    while True:
        pass


def die() -> list[Finding]:
    print("the last word", file=sys.stderr, flush=True)
    os.abort()


def fail() -> list[Finding]:
    raise ValueError("was not foreseen")


def test_what_dies_or_raises_is_told_and_takes_nothing_with_it() -> None:
    checks = [Check("a", fine, ("a",)), Check("b", die), Check("c", fail), Check("d", fine, ("d",))]
    rows = run_checks(checks, timeout_s=120)
    assert [row.check for row in rows] == ["fine", "doctor.broken", "doctor.broken", "fine"]
    assert [row.subject for row in rows] == ["a", "b", "c", "d"]
    assert "the last word" in rows[1].found
    assert "ValueError: was not foreseen" in rows[2].found


def test_what_hangs_is_ended_and_told() -> None:
    late = warning("late", "it", "is slow", "wait")
    rows = run_checks([Check("a", hang), Check("b", hang, late=late)], timeout_s=1)
    assert rows[1] == late
    assert (rows[0].check, rows[0].subject) == ("doctor.timeout", "a")
    assert "within 1 s" in rows[0].found


def test_what_only_needs_more_time_is_no_failure() -> None:
    rows = run_checks([Check("a", work), Check("b", hang)], timeout_s=8)
    assert [(row.check, row.state) for row in rows] == [("doctor.busy", "warning"), ("doctor.timeout", "failure")]
