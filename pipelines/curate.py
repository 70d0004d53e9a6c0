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
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import storage
from aai.digest import stored_digest
from aai.errors import UserError
from aai.media.measure import DECODER
from aai.version import code_version
from pipelines.curation import similarity
from pipelines.curation.croissant import AboutConfig
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.cut import cut_rows
from pipelines.curation.decoders import current_decoders
from pipelines.curation.layout import ACCEPTED, REJECTED, SCORED, shard_file
from pipelines.curation.ledger import row_keys
from pipelines.curation.measuring import check_ratio, measure_rows
from pipelines.curation.own_signals import check_signals, describe_signals, join_signals, signal_rules
from pipelines.curation.similarity import CaptionedClip, ScoreShard
from pipelines.curation.verdicts import DIGEST as JUDGED
from pipelines.curation.verdicts import JudgeShard, JudgeWorker, judge, judge_shards, read_measured
from pipelines.engine.lock import is_empty, locked
from pipelines.engine.shards import run_shards
from pipelines.manifests.extras import columns
from pipelines.manifests.row import ManifestRow
from pipelines.registry import store

log = logging.getLogger(__name__)

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


# ---------------------------------------------------------------- the stage


@locked
def run(config: CurateConfig) -> dict[str, Any]:
    """Curates a manifest; returns what curate.json holds. A second run with nothing changed does nothing."""
    begin = time.monotonic()
    if config.tracking:
        store.check(config.tracking)
    config, chosen = config.fitted()
    rows, carved = config.listed()
    chosen |= carved
    for name, choice in chosen.items():
        log.info("curate: %s = %s", name, choice)
    if config.scores.bundle or config.scores.tagger:
        from pipelines.curation.scores import check_sound  # only here: torch takes seconds to import

        check_sound(config.scores, config.decode.sample_rate_hz)
    sources = check_signals(config.signals, rows, config.scores.names)
    out = storage.absolute(config.out)
    settings = config.digests()
    _open(out, settings, config.rejudge)
    rows = cut_rows(rows, config.cut, config.decode, out, config.cluster, os.path.dirname(out))
    keys = row_keys(rows)
    given = [keys, [row.content() for row in rows], *([sources] if sources else [])]
    if config.about != AboutConfig():
        given.append(config.about.model_dump(mode="json"))
    settings["input"] = stored_digest(given, sort_keys=True)
    where = storage.join(out, "curate.json")
    earlier = storage.read_json(where) if storage.exists(where) else None
    if earlier and not config.retry and all(earlier.get(name) == value for name, value in settings.items()):
        log.info("curate: up to date: %s", _summary(earlier, config.out))
        current_decoders(out, earlier, keys)
        return dict(earlier)
    storage.remove(where)
    ledger, counts = measure_rows(config, out, rows, keys)
    by_key = dict(zip(keys, rows, strict=True))
    shards = {name: [entry.key for entry in entries] for name, entries in ledger.valid(set(keys)).items()}
    if config.scores.enabled:
        _score(config, out, shards, by_key)
    judged = _judge(config, out, shards, by_key)
    result = settings | _totals(out, len(rows), chosen["decode.frame_size_px"].value)
    result |= judged | {
        "chosen": {name: choice.model_dump() for name, choice in chosen.items()},
        "measured": counts["measured"],
        "reused": counts["reused"],
        "decoders": current_decoders(out, earlier, keys) if counts["earlier"] else [DECODER],
        "seconds": round(time.monotonic() - begin, 1),
        "written_by": code_version(),
    }
    check_ratio(config, result["rejected"], len(rows), f"({result['by_code']})")
    _write_card(config, out, result)
    storage.write_json(where, result)
    log.info("curate: %s", _summary(result, config.out))
    return result


# ---------------------------------------------------------------- its steps


def _open(out: str, digests: Mapping[str, int | str], rejudge: bool) -> None:
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
            remedy = "choose another, or pass --rejudge to judge them anew"
            raise UserError("out", out, "holds tables made with other filters", remedy)
        storage.remove(storage.join(out, "curate.json"))
        storage.write_json(started, digests)


def _score(config: CurateConfig, out: str, shards: Mapping[str, list[str]], rows: Mapping[str, ManifestRow]) -> None:
    """Scores every shard whose scores are missing, or of other models or captions."""
    from pipelines.curation.scores import ScoreWorker  # only here: torch takes seconds to import

    models = config.scores.content_digest()
    todo = []
    for name, keys in shards.items():
        clips = [CaptionedClip(key, rows[key].caption) for key in keys]
        of_shard = similarity.shard_digest(models, clips)
        todo.append(ScoreShard(name=name, rows=len(keys), clips=clips, digest=of_shard))
    cluster = config.cluster
    args = {
        "out": out,
        "config": config.scores.model_dump(mode="json"),
        "threads": max(1, int(cluster.cpus_per_worker)),
        "gpu": cluster.gpus_per_worker > 0,
    }
    done = _done_as(_footers(out, SCORED, similarity.DIGEST))
    run_shards("curate: score", todo, ScoreWorker, args, cluster, done, os.path.dirname(out))


def _judge(
    config: CurateConfig, out: str, shards: Mapping[str, list[str]], rows: Mapping[str, ManifestRow]
) -> dict[str, Any]:
    """Writes accepted/ and rejected/ as the manifest and the settings now want them.

    Returns what curate.json tells of it: the similarity of sound and pictures by chance, where a bundle tells it, and
    the columns and signals that are not measured here.
    """
    measured = read_measured(out, shards, config.scores.enabled, config.scores.names)
    measured = join_signals(measured, rows, config.signals, config.manifest)
    verdicts, null = judge(measured, rows, config, out)
    further = columns(row.extra for row in rows.values())
    signals = describe_signals(measured, config.signals, config.scores.names)
    todo = judge_shards(measured, shards, rows, verdicts, config.flag_only, further, list(signals))
    for folder in (ACCEPTED, REJECTED):  # each by itself: a kill may have left one of a shard's two tables
        for name in storage.shard_names(storage.join(out, folder)) - set(shards):  # none of its clips is wanted
            storage.remove(shard_file(out, folder, name))
    args = {"out": out, "flag_only": config.flag_only}
    done = _done_as(_footers(out, REJECTED, JUDGED), _footers(out, ACCEPTED, JUDGED))
    run_shards("curate: split", todo, JudgeWorker, args, config.cluster, done, os.path.dirname(out), stateful=False)
    return {
        "correspondence": null.describe() if null else None,
        "columns": further,
        "signals": signals,
        "signal_rules": [list(rule) for rule in signal_rules(config.signals)],
    }


def _footers(out: str, folder: str, key: bytes) -> dict[str, str]:
    """{shard: what its table carries under `key`}; small reads, many at once."""

    def read(name: str) -> str:
        fs, path = storage.filesystem(shard_file(out, folder, name))
        return dict(pq.read_schema(path, filesystem=fs).metadata or {}).get(key, b"").decode()

    names = sorted(storage.shard_names(storage.join(out, folder)))
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _done_as(*tables: Mapping[str, str]) -> Callable[[ScoreShard | JudgeShard], bool]:
    """Whether each of a shard's tables was made of what it would be made of now."""
    return lambda shard: all(digests.get(shard.name) == shard.digest for digests in tables)


def _write_card(config: CurateConfig, out: str, result: Mapping[str, Any]) -> None:
    from pipelines.curation.card import log_card, write_card  # only here: plots are a heavy import

    card = write_card(out, config.filters.model_dump(), result, config.about)
    if config.tracking:
        log_card(config.tracking, "curate", out, card)


# ---------------------------------------------------------------- its result


def _totals(out: str, rows_in: int, frame_size_px: float) -> dict[str, Any]:
    """Counts from the tables themselves."""
    taken = storage.read_table(storage.join(out, ACCEPTED), ["duration_s", "flags", "width", "height"])
    reasons = storage.read_table(storage.join(out, REJECTED), ["code", "transient"])
    codes, transient = reasons["code"].to_pylist(), reasons["transient"].to_pylist()
    short_px = pc.min_element_wise(taken["width"], taken["height"]).to_pylist()
    if rows_in != len(taken) + len(codes):
        raise RuntimeError(f"curate: {rows_in} rows in, but {len(taken)} accepted and {len(codes)} rejected")
    flags = Counter(pc.list_flatten(taken["flags"]).to_pylist())
    return {
        "rows_in": rows_in,
        "accepted": len(taken),
        "rejected": len(codes),
        "by_code": _counts(Counter(codes)),
        "flagged": _counts(flags),
        "transient": sum(transient),
        "small_sources": sum(edge_px < frame_size_px for edge_px in short_px),
        "hours": round(sum(taken["duration_s"].to_pylist()) / 3600, 4),
    }


def _counts(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _summary(result: Mapping[str, Any], out: str) -> str:
    counts = f"{result['rows_in']} rows in = {result['accepted']} accepted + {result['rejected']} rejected"
    codes = ", ".join(f"{code} {count}" for code, count in result["by_code"].items())
    if codes:
        counts += f" ({codes})"
    flags = ", ".join(f"{code} {count}" for code, count in result["flagged"].items())
    if flags:
        counts += f", flagged: {flags}"
    if small := result.get("small_sources"):  # results of before do not have it
        size_px = result["chosen"]["decode.frame_size_px"]["value"]
        counts += f"; {small} sources are smaller than {size_px:g} px and keep their own size"
    return f"{counts} in {result['seconds']:.0f} s -> {out}"
