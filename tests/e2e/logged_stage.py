"""align whose tasks write down which clips they hear: `python -m tests.e2e.logged_stage FOLDER NAME=VALUE ...`."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aai.align import AlignTask
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.training.stage import run_stage

ROOT = Path(__file__).resolve().parents[2]


class LoggedTask(AlignTask):
    """Notes the clips of each step, a line each."""

    notes: str

    def forward(self, batch: dict[str, Any]) -> Any:
        """See AlignTask."""
        with Path(self.notes).open("a") as file:
            file.write(json.dumps(batch["clip_id"]) + "\n")
        return super().forward(batch)


class LoggedRecipe(AlignRecipe):
    """See LoggedTask."""

    folder: str
    """Where each process has a file of its own; of the class, which goes to the workers as it is."""

    def build(self) -> AlignTask:
        """See TrainRecipe."""
        task = super().build()
        task.__class__ = LoggedTask
        task.notes = f"{self.folder}/{os.getpid()}-{time.time_ns()}.jsonl"
        return task


if __name__ == "__main__":
    LoggedRecipe.folder = sys.argv[1]
    run_stage(LoggedRecipe, AlignConfig.load(ROOT / "configs" / "demo" / "align.yaml", sys.argv[2:]))
