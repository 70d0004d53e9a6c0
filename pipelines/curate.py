"""Decodes every clip of a manifest once, measures it, filters it, drops duplicates.

    aai curate --manifest clips.csv --out curated
    aai curate ... --retry IO_ERROR,TIMEOUT    # measure these rejects again; TRANSIENT: all that may pass next time
    aai curate ... --flag-only                 # keep what filters speak against, and mark it
    aai curate ... --rejudge                   # new thresholds on what is measured already: nothing is decoded

out/accepted holds the ClipTable, out/rejected the RejectTable with the reason of every row that was not taken:
rows in = accepted + rejected. out/curate.json holds the counts, out/card.html shows what each filter did. Run it again
after a kill, or when the manifest has grown: only what is missing is done.
"""

import argparse
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pyarrow.parquet as pq
import pydantic

from aai import storage
from aai.errors import UserError
from aai.media.decode import DecodeConfig
from aai.media.duplicates import DuplicateConfig
from aai.media.filters import FilterConfig, broken_rules
from aai.schema import VERSION
from aai.version import code_version
from pipelines.curation import similarity
from pipelines.curation.cut import CutConfig, cut_rows
from pipelines.curation.ledger import row_keys
from pipelines.curation.measuring import check_ratio, measure_rows, shard_file
from pipelines.curation.similarity import CaptionedClip, Null, ScoreConfig, ScoreShard
from pipelines.curation.verdicts import DIGEST as JUDGED
from pipelines.curation.verdicts import JudgeShard, JudgeWorker, judge, judge_shards, read_measured
from pipelines.engine.lock import is_empty, locked
from pipelines.engine.shards import run_shards
from pipelines.manifests.table import Row, named_splits, read_manifest, with_val_share
from pipelines.registry import store
from pipelines.settings import Plan, RayVerbConfig, TrackingConfig

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


class CurateConfig(RayVerbConfig):
    """Settings of `aai curate`."""

    manifest: str
    """CSV or Parquet (uri, start_s, end_s, caption, labels, split), a WebDataset tar, or a folder of media and tars."""
    media_root: str | None = None
    """Folder of the videos when the manifest is the CSV of VGGSound or of AudioSet."""
    label_names: str | None = None
    """AudioSet's class_labels_indices.csv, which gives its labels words."""
    out: str
    """Folder or s3:// prefix of the tables."""
    default_split: Split = "train"
    """Split of rows that name none."""
    split_names: dict[str, Split] = pydantic.Field(default_factory=dict)
    """What the manifest's splits are called here, where not train, val and test: {validation: val, eval: test}."""
    val_share: float = pydantic.Field(0, ge=0, lt=1)
    """Share of train's files, chosen by a hash of their URIs, that become the split val: for data that has none."""
    cut: CutConfig = CutConfig()
    rows_per_shard: int = pydantic.Field(128, ge=1)
    """Rows of one unit of work, and of one Parquet file."""
    decode: DecodeConfig = DecodeConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    scores: ScoreConfig = ScoreConfig()
    flag_only: bool = False
    """Keep clips that filters speak against, and put the codes into the column `flags`."""
    max_reject_ratio: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of rejected rows above which the job stops, keeping what is done: the data or the settings are wrong."""
    retry: tuple[str, ...] = ()
    """Codes of undecodable rows to measure again in this run; TRANSIENT = all that may pass next time."""
    rejudge: bool = False
    """Judge what is measured already by other filters than it was judged by."""
    tracking: TrackingConfig | None = None
    """MLflow store that the data card is logged to, as a run `curate`; empty = nowhere."""

    @pydantic.field_validator("retry", mode="before")
    @classmethod
    def _split_codes(cls, value: object) -> object:
        return [code.strip() for code in value.split(",") if code.strip()] if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _scored(self) -> "CurateConfig":
        if self.filters.min_caption_similarity is not None and not self.scores.caption:
            raise ValueError("filters.min_caption_similarity needs scores.caption=true")
        return self

    def plan(self) -> Plan:
        """Counts the manifest's rows; decodes nothing."""
        rows = len(self.rows())
        shards = -(-rows // self.rows_per_shard)
        return Plan(
            inputs={"manifest": f"{self.manifest} ({rows} rows, {shards} shards)"},
            outputs={"accepted": storage.join(self.out, "accepted"), "rejected": storage.join(self.out, "rejected")},
            resources=self.resources(),
        )

    def rows(self) -> list[Row]:
        """The manifest's rows with their splits by our names and with `val_share`, before any cutting."""
        rows = read_manifest(self.manifest, self.media_root, self.default_split, self.label_names)
        rows = named_splits(self.manifest, rows, self.split_names)
        return with_val_share(rows, self.val_share) if self.val_share else rows

    def digests(self) -> dict[str, Any]:
        """Of the settings that decide what is measured, and how that is judged."""
        measured = {"version": VERSION, "decode": self.decode.model_dump(mode="json", exclude=SPEED)}
        judged = self.model_dump(mode="json", include={"filters", "duplicates", "flag_only"})
        judged["scores"] = (
            [self.scores.content_digest(), self.scores.false_accept_rate] if self.scores.enabled else None
        )
        return {"version": VERSION, "decode": _digest(measured), "judge": _digest(judged)}


SPEED = {"decode_threads", "timeout_s", "max_memory_mb", "recycle_after"}
"""Decode settings that decide how clips are decoded, not what stands in the tables."""
CONFIG = CurateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--manifest", metavar="FILE", help="CSV or Parquet manifest, or a folder of media files")
    parser.add_argument("--out", metavar="DIR", help="folder or s3:// prefix of the tables")
    parser.add_argument(
        "--retry", metavar="CODE,...", help="measure rejects with these codes again; TRANSIENT: all that may pass"
    )
    parser.add_argument("--flag-only", action="store_true", help="keep what filters speak against, and mark it")
    parser.add_argument("--rejudge", action="store_true", help="judge measured clips by the present filters")
    parser.add_argument(
        "--max-reject-ratio", metavar="SHARE", help="stop when more than this share is rejected; what is done is kept"
    )
    return {name: name for name in ("manifest", "out", "retry", "flag_only", "rejudge", "max_reject_ratio")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- scoring and judging


def _footers(out: str, folder: str, key: bytes) -> dict[str, str]:
    """{shard: what its table carries under `key`}; small reads, many at once."""

    def read(name: str) -> str:
        fs, path = storage.filesystem(shard_file(out, folder, name))
        return dict(pq.read_schema(path, filesystem=fs).metadata or {}).get(key, b"").decode()

    names = sorted(storage.shard_names(storage.join(out, folder)))
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _done_as(digests: dict[str, str]) -> Callable[[ScoreShard | JudgeShard], bool]:
    return lambda shard: digests.get(shard.name) == shard.digest


def _score(config: CurateConfig, out: str, shards: dict[str, list[str]], rows: dict[str, Row]) -> None:
    """Scores every shard whose scores are missing, or of other models or captions."""
    from pipelines.curation.scores import ScoreWorker  # only here: torch takes seconds to import

    digest = config.scores.content_digest()
    todo = []
    for name, keys in shards.items():
        clips = [CaptionedClip(key, rows[key]["caption"]) for key in keys]
        of_shard = similarity.shard_digest(digest, clips)
        todo.append(ScoreShard(name=name, rows=len(keys), clips=clips, digest=of_shard))
    cluster = config.cluster
    args = {
        "out": out,
        "config": config.scores.model_dump(mode="json"),
        "threads": max(1, int(cluster.cpus_per_worker)),
        "gpu": cluster.gpus_per_worker > 0,
    }
    done = _done_as(_footers(out, similarity.FOLDER, similarity.DIGEST))
    run_shards("curate: score", todo, ScoreWorker, args, cluster, done, os.path.dirname(out))


def _judge(config: CurateConfig, out: str, shards: dict[str, list[str]], rows: dict[str, Row]) -> dict[str, Any] | None:
    """Writes accepted/ and rejected/ as the manifest and the settings now want them; returns the null's figures."""
    enabled, null = config.scores.enabled, None
    measured = read_measured(out, shards, rows, enabled)
    if config.scores.bundle:
        good = {row["key"] for row in measured if not row["code"] and not broken_rules(row, config.filters)}
        null = Null.measure(out, list(shards), rows, good, config.scores.false_accept_rate)
    verdicts = judge(measured, config, null, out)
    todo = judge_shards(measured, shards, verdicts, config.flag_only)
    for name in storage.shard_names(storage.join(out, "accepted")) - set(
        shards
    ):  # none of its clips is wanted any more
        for folder in ("accepted", "rejected"):
            storage.remove(shard_file(out, folder, name))
    args = {"out": out, "flag_only": config.flag_only}
    done = _done_as(_footers(out, "accepted", JUDGED))
    run_shards("curate: split", todo, JudgeWorker, args, config.cluster, done, os.path.dirname(out), stateful=False)
    return null.describe() if null else None


# ---------------------------------------------------------------- the stage


def _open(out: str, digests: dict[str, Any], rejudge: bool) -> None:
    """Makes sure that what lies in the output folder is of these settings. Raises UserError when it is not."""
    started = storage.join(out, "_started.json")
    if not storage.exists(started):
        if not is_empty(out):
            raise UserError("out", out, "is not empty, nor written by curate", "choose another, or delete it")
        storage.write_json(started, digests)
        return
    before = storage.read_json(started)
    if any(before.get(name) != digests[name] for name in ("version", "decode")):
        raise UserError("out", out, "holds clips decoded by other settings", "choose another, or delete it")
    if before.get("judge") != digests["judge"]:
        if not rejudge:
            rule, remedy = (
                "holds tables made with other filters",
                "choose another, or pass --rejudge to judge them anew",
            )
            raise UserError("out", out, rule, remedy)
        storage.remove(storage.join(out, "curate.json"))
        storage.write_json(started, digests)


def _totals(out: str, rows_in: int) -> dict[str, Any]:
    """Counts from the tables themselves."""
    taken = storage.read_table(storage.join(out, "accepted"), ["duration_s", "flags"])
    reasons = storage.read_table(storage.join(out, "rejected"), ["code", "transient"])
    codes, transient = reasons["code"].to_pylist(), reasons["transient"].to_pylist()
    if rows_in != len(taken) + len(codes):
        raise RuntimeError(f"curate: {rows_in} rows in, but {len(taken)} accepted and {len(codes)} rejected")
    flags = Counter(flag for flags in taken["flags"].to_pylist() for flag in flags)
    return {
        "rows_in": rows_in,
        "accepted": len(taken),
        "rejected": len(codes),
        "by_code": _counts(Counter(codes)),
        "flagged": _counts(flags),
        "transient": sum(transient),
        "hours": round(sum(taken["duration_s"].to_pylist()) / 3600, 4),
    }


def _counts(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _summary(result: dict[str, Any], out: str) -> str:
    codes = ", ".join(f"{code} {count}" for code, count in result["by_code"].items())
    flags = ", ".join(f"{code} {count}" for code, count in result["flagged"].items())
    return (
        f"{result['rows_in']} rows in = {result['accepted']} accepted + {result['rejected']} rejected"
        f"{f' ({codes})' if codes else ''}{f', flagged: {flags}' if flags else ''}"
        f" in {result['seconds']:.0f} s -> {out}"
    )


@locked
def run(config: CurateConfig) -> dict[str, Any]:
    """Curates a manifest; returns what curate.json holds. A second run with nothing changed does nothing."""
    begin = time.monotonic()
    if config.tracking:
        store.check(config.tracking)
    rows = config.rows()
    out = storage.absolute(config.out)
    settings = config.digests()
    _open(out, settings, config.rejudge)
    rows = cut_rows(rows, config.cut, config.decode, out, config.cluster, os.path.dirname(out))
    keys = row_keys(rows)
    settings["input"] = _digest([keys, rows])
    where = storage.join(out, "curate.json")
    earlier = storage.read_json(where) if storage.exists(where) else None
    if earlier and not config.retry and all(earlier.get(name) == value for name, value in settings.items()):
        log.info("curate: up to date: %s", _summary(earlier, config.out))
        return dict(earlier)
    storage.remove(where)
    ledger, counts = measure_rows(config, out, rows, keys)
    by_key = dict(zip(keys, rows, strict=True))
    shards = {name: [entry.key for entry in entries] for name, entries in ledger.valid(set(keys)).items()}
    if config.scores.enabled:
        _score(config, out, shards, by_key)
    correspondence = _judge(config, out, shards, by_key)
    result: dict[str, Any] = settings | _totals(out, len(rows)) | {"correspondence": correspondence}
    result |= {
        "measured": counts["measured"],
        "reused": counts["reused"],
        "seconds": round(time.monotonic() - begin, 1),
        "written_by": code_version(),
    }
    check_ratio(config, result["rejected"], len(rows), f"({result['by_code']})")
    from pipelines.curation.card import log_card, write_card  # only here: plots are a heavy import

    card = write_card(out, config.filters.model_dump(), result)
    if config.tracking:
        log_card(config.tracking, "curate", out, card)
    storage.write_json(where, result)
    log.info("curate: %s", _summary(result, config.out))
    return result
