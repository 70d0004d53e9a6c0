"""The CPU that processes around a work take."""

import os
import subprocess
import sys
import time

import pytest

from pipelines.benches.background import Background, background


def test_cpus_are_those_of_a_span_without_some_processes() -> None:
    looks = [(0.0, {1: 0.0, 2: 0.0}), (10.0, {1: 5.0, 2: 1.0}), (20.0, {1: 9.0, 2: 3.0, 3: 1.0}), (30.0, {1: 99.0})]
    found = Background(looks)
    assert found.cpus(5, 25, ()) == pytest.approx((4 + 2 + 1) / 10)
    assert found.cpus(5, 25, {1}) == pytest.approx(0.3)
    assert found.cpus(5, 15, ()) == 0.0  # one look tells nothing


@pytest.mark.slow
def test_a_process_below_this_one_is_counted() -> None:
    begin_s = time.monotonic()
    with background(0.05) as found, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        end_s = time.monotonic()
        while found.cpus(begin_s, end_s, {os.getpid()}) == 0 and end_s < begin_s + 60:  # others may have the cores
            time.sleep(0.2)
            end_s = time.monotonic()
        busy.kill()
    assert found.cpus(begin_s, end_s, {os.getpid()}) > 0
    assert found.cpus(begin_s, end_s, {os.getpid(), busy.pid}) < found.cpus(begin_s, end_s, {os.getpid()})
