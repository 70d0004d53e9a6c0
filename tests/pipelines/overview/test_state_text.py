"""Where a run stands, in words."""

import pytest

from pipelines.overview.stage_states import LockHolder, PartDone, StageStatus
from pipelines.overview.state_text import as_lines, next_command

CHAIN = ("curate", "featurize", "align", "adapt", "evaluate", "promote")


def test_each_state_in_a_line_or_three() -> None:
    holder = LockHolder(host="h", pid=7, since="2026-01-02 03:04:05 UTC", beat_age_s=4)
    parts = (
        PartDone(what="measured", done=2048, of=4096, unit="clips"),
        PartDone(what="painted", done=5, of=12, unit="pictures", about=True),
    )
    stages = [
        StageStatus(stage="curate", out="c", state="running", holder=holder, last_write_s=880, progress=parts),
        StageStatus(stage="align", out="a", state="broke off", holder=holder.model_copy(update={"beat_age_s": None})),
        StageStatus(
            stage="adapt", out="d", state="finished", finished_s=0, figures={"seconds": 180, "metrics": {"x": 0.5}},
            rejects={"SILENT": 1200}, sha="abc",
        ),
        StageStatus(stage="promote", out="p", state="not begun"),
    ]  # fmt: skip
    assert as_lines(stages, now_s=1000) == [
        "curate      running    process 7 on h since 2026-01-02 03:04:05 UTC; last beat 4 s ago; last write 2 min ago",
        f"{'':<22} measured 2,048 of 4,096 clips, painted about 5 of 12 pictures",
        "align       broke off  process 7 on h since 2026-01-02 03:04:05 UTC, ended without an end",
        "adapt       finished   1970-01-01 00:00 UTC",
        f"{'':<22} took 3 min, x 0.5, bundle abc",
        f"{'':<22} rejects: SILENT 1,200",
        "promote     not begun",
    ]


def test_what_stands_in_files_moves_no_cursor() -> None:
    stage = StageStatus(stage="curate", out="c", state="finished", finished_s=0, rejects={"\x1b[2J": 1})
    assert "\x1b" not in "".join(as_lines([stage]))


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (["not begun"] * 6, "aai curate --config FILE --set run_dir=r"),
        (["running"] + ["not begun"] * 5, "nothing: curate is running"),
        (["finished", "broke off"] + ["not begun"] * 4, "aai featurize --config FILE --set run_dir=r   (goes on where"),
        (["finished"] * 6, "aai serve --config FILE --set run_dir=r"),
    ],
)
def test_the_next_command(states: list[str], told: str) -> None:
    stages = [StageStatus(stage=n, out="", state=s) for n, s in zip(CHAIN, states, strict=True)]  # type: ignore[arg-type]
    assert next_command(stages, "r", is_toy=False).startswith(told)


def test_the_next_command_of_a_toy_world_needs_no_file() -> None:
    stages = [StageStatus(stage=name, out="", state="not begun") for name in CHAIN]
    assert next_command(stages, "r", is_toy=True) == "aai curate --set run_dir=r"
    assert next_command(stages, "runs/demo", is_toy=True) == "aai curate"


def test_what_is_outdated_comes_next() -> None:
    stages = [StageStatus(stage=name, out="", state="finished", finished_s=0) for name in CHAIN]
    stages[2] = stages[2].model_copy(update={"outdated": "not made of what featurize has now (f2)"})
    assert next_command(stages, "r", False).startswith("aai align ")
    assert "not made of what featurize has now (f2): outdated" in "\n".join(as_lines(stages))
