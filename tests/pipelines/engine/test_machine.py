import numpy as np

from pipelines.engine.machine import machine, peak_memory


def test_the_machine_is_described() -> None:
    known = machine()
    assert set(known) == {"cores", "cpu", "memory_gb", "python", "torch", "ray", "gpu"}
    assert known["cores"] >= 1
    assert known["cpu"]
    assert known["ray"].count(".") == 2


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
