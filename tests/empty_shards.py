"""Shards without work through the engine: what the engine itself costs, for each and in the driver's memory.

python -m tests.empty_shards 100000      # prints a line of JSON
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.engine.cluster import connect
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class EmptyShard(Shard):
    """A shard of no work."""

    digest: str = "0123456789abcdef"


class Idle:
    """A worker that does nothing."""

    def __call__(self, shard: EmptyShard) -> Result:
        return Result(rows=shard.rows)


def peak_mb() -> float:
    """Of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def measure(count: int) -> dict[str, float]:
    """Seconds and memory of a job of so many shards, after Ray has started."""
    from tests.empty_shards import EmptyShard, Idle  # by the name that workers import

    cluster = ClusterConfig(num_workers=2)
    connect(cluster)
    before_mb, begin_s, cpu_s = peak_mb(), time.monotonic(), time.process_time()
    results = run_shards("empty", (EmptyShard(name=f"{i:08}", rows=1) for i in range(count)), Idle, {}, cluster)
    seconds = time.monotonic() - begin_s
    return {
        "shards": len(results),
        "seconds": round(seconds, 1),
        "ms_per_shard": round(1e3 * seconds / count, 3),
        "driver_cpu_s": round(time.process_time() - cpu_s, 1),
        "driver_peak_mb": round(peak_mb()),
        "driver_before_mb": round(before_mb),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
