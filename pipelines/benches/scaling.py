"""What 200 thousand, 2 million and 100 million clips take, and what gives way first: the page of `aai plan --scale`.

Rates come from the sample that `aai plan` measures. What the driver costs was measured once, on 100,000 and 1,000,000
clips (`pytest -m accept tests/e2e/test_scale.py`), and stands here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIZES = {"200 k (VGGSound)": 200_000, "2 M (AudioSet)": 2_000_000, "100 M": 100_000_000}
ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class Grown:
    """What grows with the clips in one place: at first, and for each clip or shard."""

    name: str
    base: float
    per_clip: float
    unit: str
    limit: float
    """What a node of a common kind has, or what one would wait for."""
    remedy: str

    def at(self, clips: int) -> float:
        """For so many clips."""
        return self.base + self.per_clip * clips


DRIVER = (
    Grown(
        "memory of curate's driver", 0.51, 0.70e-6, "GB", 8,
        "part the manifest: a curate for each part, each with an `out` of its own; doubles are found within a part",
    ),
    Grown(
        "memory of each worker that searches for edited copies", 0.3, 2.5e-6, "GB", 8,
        "part the manifest, or `duplicates.edited.enabled=false`, which leaves whole copies to be found",
    ),
    Grown(
        "CPU of all workers that search for edited copies", 0, 1400e-6 / 3600, "h", 24,
        "part the manifest: the search grows with it, and faster than it",
    ),
    Grown("CPU of curate's driver, first run", 0, 167e-6 / 3600, "h", 2, "larger `rows_per_shard`; part the manifest"),
    Grown("CPU of curate's driver, nothing to do", 0, 42e-6 / 3600, "h", 1, "part the manifest: finished parts rest"),
    Grown("requests of the driver to S3", 111, 4 / ROWS_PER_SHARD, "", 1e6, "larger `rows_per_shard`"),
    Grown("Ray's work for shards, three stages", 0, 3 * 0.29e-3 / ROWS_PER_SHARD / 3600, "h", 1, "larger shards"),
    Grown("files of a table", 0, 1 / ROWS_PER_SHARD, "", 1e5, "`aai data compact` before training"),
)  # fmt: skip
"""In the order in which they give way."""
FIXED = (
    "Ray's object store: names and counts alone travel through it; 512 MB on every node, whatever the clips.",
    "Training: steps, batch and learning rate stand in the config, and so does the time; a reader holds two buffers of "
    "`shuffle_clips` clips, and opens one file of the table at a time.",
    "Registry: a run writes an entry of its history each `log_every` steps, in batches, and a bundle of some MB; clips "
    "are never listed there.",
)


def page(results: Sequence[Mapping[str, Any]], command: str) -> str:
    """The page in Markdown. results: of `pipelines.plan.calculate`, one for each of SIZES, in their order."""
    first, known = results[0], results[0]["machine"]
    rates = first["measured"]
    lines = [
        "# Scale",
        "",
        "For whoever plans for more clips than there are today: what each stage takes, what grows in one place,",
        "and what gives way first. Written by",
        "",
        f"```sh\n{command}\n```",
        "",
        f"on {known['cores']} cores ({known['cpu']}), {known['gpu'] or 'no GPU'}: a sample of {rates['sample']} clips.",
        "",
        "## Assumed",
        "",
        *(f"- {note}" for note in first["assumed"]),
        "",
        "## What the stages take",
        "",
        *_stages(results),
        "",
        "## What is stored, GB",
        "",
        *_storage(results),
        "",
        "## What grows in one place",
        "",
        "Measured on 100,000 and 1,000,000 clips whose tables were drawn, not decoded",
        "(`pytest -m accept tests/e2e/test_scale.py`), and continued in a straight line; shards of",
        f"{ROWS_PER_SHARD} clips.",
        "In bold what is more than a common node has, or than one would wait for.",
        "",
        *_driver(),
        "",
        "## What gives way first, and what mends it",
        "",
        *_first_to_give_way(),
        "",
        "## What does not grow",
        "",
        *(f"- {note}" for note in FIXED),
    ]
    return "\n".join(lines) + "\n"


def short(value: float) -> str:
    """Two or three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _stages(results: Sequence[Mapping[str, Any]]) -> list[str]:
    nodes = results[0]["nodes"]
    rows = [
        f"Hours on {nodes} nodes of a kind; both: featurize takes clips as curate accepts them.",
        "",
        "| clips | node | curate | featurize | waits for | both | GPU busy | MB/s read, each node |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in zip(SIZES, results, strict=True):
        for shape in result["shapes"].values():
            kind = f"{shape['cpus']} CPU, {shape['gpus']} GPU"
            busy, read = f"{shape['gpu_busy_side_by_side']:.0%}", f"{shape['read_mb_per_s_per_node']:.3g}"
            hours = [short(shape[key]) for key in ("curate_h", "featurize_h", "side_by_side_h")]
            cells = [name, kind, *hours[:2], shape["featurize_waits_for"], hours[2], busy, read]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _storage(results: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(results[0]["storage_gb"])
    rows = [f"| clips | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for name, result in zip(SIZES, results, strict=True):
        cells = [short(result["storage_gb"][key]) for key in names]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _driver() -> list[str]:
    rows = [f"| | {' | '.join(SIZES)} |", f"| --- |{' --- |' * len(SIZES)}"]
    for grown in DRIVER:
        cells = []
        for clips in SIZES.values():
            told = f"{short(grown.at(clips))} {grown.unit}".strip()
            cells.append(f"**{told}**" if grown.at(clips) > grown.limit else told)
        rows.append(f"| {grown.name} | {' | '.join(cells)} |")
    return rows


def _first_to_give_way() -> list[str]:
    rows = []
    for name, clips in SIZES.items():
        over = [grown for grown in DRIVER if grown.at(clips) > grown.limit]
        if not over:
            rows.append(f"- **{name}**: nothing; the workers' time is all that counts.")
            continue
        rows.append(f"- **{name}**:")
        rows += [f"    - {grown.name}: {grown.remedy}." for grown in over]
    return rows
