import time

import numpy as np

from pipelines.engine.machine import load, machine, peak_memory


def test_the_machine_is_described() -> None:
    known = machine()
    assert set(known) == {"cores", "cpu", "memory_gb", "python", "torch", "ray", "gpu"}
    assert known["cores"] >= 1
    assert known["cpu"]
    assert known["ray"].count(".") == 2


def test_how_busy_the_machine_is() -> None:
    load()
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < 0.3:
        pass
    found = load()
    assert {"system/cpu_share", "system/memory_share"} <= found.keys()
    assert all(0 < share <= 1 for name, share in found.items() if name != "system/gpu_share"), found


def test_the_peak_is_seen_after_it_is_over() -> None:
    with peak_memory(0.01) as before:
        pass
    with peak_memory(0.01) as peak:
        held = np.ones(30_000_000)
        while peak[0] < held.nbytes:
            pass
        del held
    assert peak[0] >= 240e6
    assert before[0] < 100e9
