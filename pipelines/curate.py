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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aai import storage
from aai.digest import stored_digest_of_lists
from aai.errors import UserError
from aai.media.measure import DECODER
from aai.schema import NO_PICTURE, PICTURE, STILL_PICTURE, VIDEO_PICTURES
from aai.version import code_version
from pipelines.curation import similarity
from pipelines.curation.card_data import Rows
from pipelines.curation.clip_keys import ClipKeys, Keyed
from pipelines.curation.croissant import AboutConfig
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.cut import cut_rows
from pipelines.curation.decoders import current_decoders, tell_older
from pipelines.curation.layout import ACCEPTED, REJECTED, SCORED, WAITING, shard_file, shard_of
from pipelines.curation.ledger import row_keys
from pipelines.curation.measured import MeasuredTables
from pipelines.curation.measuring import check_ratio, measure_rows
from pipelines.curation.outcome import JudgedTables
from pipelines.curation.own_signals import check_signals, describe_signals, join_signals, signal_rules
from pipelines.curation.similarity import CaptionedClip, ScoreShard
from pipelines.curation.verdicts import DIGEST as JUDGED
from pipelines.curation.verdicts import JudgeShard, JudgeWorker, are_mixed, judge, judge_shards, read_measured
from pipelines.engine.columns import read_footers
from pipelines.engine.lock import is_empty, locked
from pipelines.engine.shards import run_shards
from pipelines.manifests.extras import TEXT, columns
from pipelines.manifests.packed import extras_of, have_images
from pipelines.manifests.row import ManifestRow
from pipelines.registry import store

log = logging.getLogger(__name__)

CONFIG = CurateConfig
ALONE_UP_TO = 2000
"""Clips that are split sooner by the driver itself than Ray is started."""


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
    rows: Sequence[ManifestRow]
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
    rows = cut_rows(rows, config.cut, config.decode, out, config.cluster, os.path.dirname(out), config.kept_bytes)
    keys = row_keys(rows)
    settings["input"] = _input(config, rows, keys, sources)
    where = storage.join(out, "curate.json")
    earlier = storage.read_json(where) if storage.exists(where) else None
    if earlier and not config.retry and all(earlier.get(name) == value for name, value in settings.items()):
        log.info("curate: up to date: %s", _summary(earlier, config.out))
        current_decoders(out, earlier, keys)
        return dict(earlier)
    storage.remove(where)
    measured = MeasuredTables(out, compares=config.duplicates.enabled or config.exclude is not None)
    shards, counts = measure_rows(config, out, rows, keys, measured)
    by_key = Keyed(keys, rows)
    if config.scores.enabled:
        _score(config, out, shards, by_key)
    found, judged = _judge(config, measured, shards, by_key)
    result = settings | found | {
        "small_sources": _small_sources(judged, chosen["decode.frame_size_px"].value),
        "hours": judged.hours(judged.accepted),
        "chosen": {name: choice.model_dump() for name, choice in chosen.items()},
        "measured": counts["measured"],
        "reused": counts["reused"],
        "seconds": round(time.monotonic() - begin, 1),
        "written_by": code_version(),
    }  # fmt: skip
    check_ratio(config, result["rejected"], len(rows), f"({result['by_code']})")
    _write_card(config, out, result, judged)
    storage.write_json(where, result)
    log.info("curate: %s", _summary(result, config.out))
    return result


# ---------------------------------------------------------------- its steps


def _input(config: CurateConfig, rows: Sequence[ManifestRow], keys: ClipKeys, sources: str | None) -> str:
    """Digest of what goes in: the clips and what is said of them. sources: of signals that come from elsewhere."""
    given: list[Iterable[Any]] = [keys, (row.content() for row in rows)]
    further: list[Any] = [sources] if sources else []
    if config.about != AboutConfig():
        further.append(config.about.model_dump(mode="json"))
    return stored_digest_of_lists(given, further)


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


def _score(config: CurateConfig, out: str, shards: Mapping[str, ClipKeys], rows: Mapping[str, ManifestRow]) -> None:
    """Scores every shard whose scores are missing, or of other models or captions."""
    from pipelines.curation.scores import ScoreWorker  # only here: torch takes seconds to import

    models = config.scores.content_digest()

    def wanted() -> Iterator[ScoreShard]:
        for name, keys in shards.items():
            clips = [CaptionedClip(key, rows[key].caption) for key in keys]
            of_shard = similarity.shard_digest(models, clips)
            yield ScoreShard(name=name, rows=len(keys), clips=clips, digest=of_shard)

    cluster = config.cluster
    args = {
        "out": out,
        "config": config.scores.model_dump(mode="json"),
        "threads": max(1, int(cluster.cpus_per_worker)),
        "gpu": cluster.gpus_per_worker > 0,
    }
    made_of = {name: digest for name, (digest, _) in _footers(out, SCORED, similarity.DIGEST).items()}

    def is_done(shard: ScoreShard) -> bool:
        return made_of.get(shard.name) == shard.digest

    logs, waiting = os.path.dirname(out), storage.join(out, WAITING)
    run_shards("curate: score", wanted(), ScoreWorker, args, cluster, is_done, logs, waiting=waiting)


def _judge(
    config: CurateConfig, tables: MeasuredTables, shards: Mapping[str, ClipKeys], rows: Keyed[ManifestRow]
) -> tuple[dict[str, Any], Rows]:
    """Writes accepted/ and rejected/ as the manifest and the settings now want them.

    Returns what curate.json tells of it, and the tables' small columns.
    """
    out, names = tables.out, config.scores.names
    measured, decoders = read_measured(tables, shards, config.scores.enabled, names)
    measured = join_signals(measured, rows, config.signals, config.manifest)
    verdicts, null = judge(measured, tables.prints, rows, config, out)
    further = columns(extras_of(rows.in_order))
    if have_images(rows.in_order):
        further["image_uri"] = TEXT
    if are_mixed(measured):
        further[PICTURE] = TEXT
    signals = describe_signals(measured, config.signals, names)
    outcome = JudgedTables(out, measured, config.flag_only, list(signals))
    todo = judge_shards(measured, shards, rows, verdicts, config.flag_only, further, list(signals))
    accepted = _split(config, out, outcome.watch(todo), shards)
    judged = outcome.rows()
    if (len(rows), accepted) != (len(judged.accepted), judged.accepted.sum()):
        raise RuntimeError(f"curate: {len(rows)} rows in, {judged.accepted.sum()} taken, but {accepted} accepted")
    read_by = decoders.read_by()
    tell_older(read_by)
    return {
        "rows_in": len(rows),
        "accepted": accepted,
        "rejected": len(rows) - accepted,
        "by_code": outcome.codes(),
        "flagged": outcome.flags(),
        "transient": int(judged.transient.sum()),
        **({"pictures": outcome.pictures()} if PICTURE in further else {}),
        "correspondence": null.describe() if null else None,
        "columns": further,
        "signals": signals,
        "signal_rules": [list(rule) for rule in signal_rules(config.signals)],
        "decoders": list(read_by) or [DECODER],
    }, judged


def _split(config: CurateConfig, out: str, todo: Iterable[JudgeShard], shards: Collection[str]) -> int:
    """Writes the two tables of each shard, as far as they are not there; returns how many clips are accepted."""
    made_of = {folder: _footers(out, folder, JUDGED) for folder in (ACCEPTED, REJECTED)}
    for folder, found in made_of.items():  # each by itself: a kill may have left one of a shard's two tables
        for name in set(found) - set(shards):  # none of its clips is wanted any more
            storage.remove(shard_file(out, folder, name))
    accepted = 0

    def is_done(shard: JudgeShard) -> bool:
        nonlocal accepted
        if any(found.get(shard.name, ("", 0))[0] != shard.digest for found in made_of.values()):
            return False
        accepted += made_of[ACCEPTED][shard.name][1]
        return True

    args = {"out": out, "flag_only": config.flag_only}
    logs, waiting = os.path.dirname(out), storage.join(out, WAITING)
    results = run_shards(
        "curate: split", todo, JudgeWorker, args, config.cluster, is_done, logs, False, waiting=waiting,
        alone_up_to=ALONE_UP_TO,
    )  # fmt: skip
    return accepted + sum(result.rows - (result.rejected or 0) for result in results)


def _footers(out: str, folder: str, key: bytes) -> dict[str, tuple[str, int]]:
    """{shard: what its table carries under `key`, and its rows}."""
    files = storage.file_sizes(storage.join(out, folder), ".parquet")
    found = {}
    for file, footer in zip(files, read_footers(files), strict=True):
        found[shard_of(file)] = ((footer.metadata or {}).get(key, b"").decode(), footer.num_rows)
    return found


def _write_card(config: CurateConfig, out: str, result: Mapping[str, Any], judged: Rows) -> None:
    from pipelines.curation.card import log_card, write_card  # only here: plots are a heavy import

    card = write_card(out, config.filters.model_dump(), result, judged, config.about)
    if config.tracking:
        log_card(config.tracking, "curate", out, card)


# ---------------------------------------------------------------- its result


def _small_sources(judged: Rows, frame_size_px: float) -> int:
    """Accepted clips whose source is smaller than pictures would be kept."""
    short_px = np.fmin(judged.values["width"], judged.values["height"])
    return int((short_px[judged.accepted] < frame_size_px).sum())


def _summary(result: Mapping[str, Any], out: str) -> str:
    counts = f"{result['rows_in']} rows in = {result['accepted']} accepted + {result['rejected']} rejected"
    codes = ", ".join(f"{code} {count}" for code, count in result["by_code"].items())
    if codes:
        counts += f" ({codes})"
    flags = ", ".join(f"{code} {count}" for code, count in result["flagged"].items())
    if flags:
        counts += f", flagged: {flags}"
    if pictures := result.get("pictures"):
        counts += f"; taken with a video {pictures[VIDEO_PICTURES]}, with a still picture {pictures[STILL_PICTURE]}, "
        counts += f"with sound and text alone {pictures[NO_PICTURE]}"
    if small := result.get("small_sources"):  # results of before do not have it
        size_px = result["chosen"]["decode.frame_size_px"]["value"]
        counts += f"; {small} sources are smaller than {size_px:g} px and keep their own size"
    return f"{counts} in {result['seconds']:.0f} s -> {out}"
