"""The figures of a data card: funnel, histograms, what moving a threshold would change, borderline rows, groups."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from aai.media.filters import RULES, FilterConfig
from aai.schema import SIGNALS
from pipelines.curation.card_data import Entry, Rows
from pipelines.curation.own_signals import SignalRule

STAGES = ("read", "decode", "score", "filter", "correspondence", "source", "duplicate")
"""Stages in the order in which a row meets them; any other comes after."""
CORRESPONDENCE = ("WRONG_AUDIO", "av_similarity", "correspondence.threshold", "", +1)
"""The filter whose threshold is set from shuffled pairs and not by a setting; see RULES."""
BINS = 40
STEPS = (-4, -2, -1, 1, 2, 4)
"""Where thresholds are tried, in steps of about a tenth of the threshold."""
MAX_LABELS, MAX_SPLITS = 2000, 8
OTHER_SPLITS = "(other)"
"""Stands for the splits that are not among the largest."""
_MEASURED = {f.name for f in SIGNALS}


class Rule(SignalRule):
    """A filter: `signal` must be at least (sign +1) or at most (-1) `limit`."""

    __slots__ = ()

    def passes(self, rows: Rows, limit: float | None = None) -> np.ndarray:
        """bool [N] of all rows; what was not measured fails, but what only some clips have passes: a similarity, or a
        signal of somebody's own."""
        values = rows.values[self.signal]
        good = self.sign * (values - (self.limit if limit is None else limit)) >= 0
        return good if self.signal in _MEASURED else good | np.isnan(values)


def rules(filters: Mapping[str, Any], result: Mapping[str, Any]) -> list[Rule]:
    """The filters that are in force, in the order of judgement."""
    found = [Rule(*rule, float(filters[rule[2]])) for rule in RULES if filters.get(rule[2]) is not None]
    found += [Rule(*rule) for rule in result.get("signal_rules", ())]
    threshold = (result.get("correspondence") or {}).get("threshold")
    known = {rule.signal for rule in found}
    if threshold is not None and CORRESPONDENCE[1] not in known:
        found.append(Rule(*CORRESPONDENCE, float(threshold)))
    return found


def funnel(rows: Rows) -> Entry:
    """Rows and hours at every stage and for every code, from rows in to accepted."""
    total = len(rows.accepted)
    left, left_hours = total, rows.hours(np.ones(total, bool))
    stages = []
    for name in sorted(rows.stages, key=lambda s: STAGES.index(s) if s in STAGES else len(STAGES)):
        here = rows.stage == rows.stages.index(name)
        left, left_hours = left - int(here.sum()), left_hours - rows.hours(here)
        codes = [_count(rows, code, here & (rows.marks == rows.bits([code]))) for code in rows.codes]
        codes = sorted((c for c in codes if c["rows"]), key=lambda c: (-c["rows"], c["code"]))
        entry = {"stage": name, "rows": int(here.sum()), "hours": rows.hours(here), "codes": codes}
        stages.append(entry | {"left_rows": left, "left_hours": round(left_hours, 4)})
    flags = [_count(rows, code, rows.accepted & (rows.marks & rows.bits([code]) != 0)) for code in rows.codes]
    return {
        "rows_in": total,
        "hours_in": rows.hours(np.ones(total, bool)),
        "accepted": int(rows.accepted.sum()),
        "hours": rows.hours(rows.accepted),
        "rejected": int((~rows.accepted).sum()),
        "transient": int(rows.transient.sum()),
        "flagged": int((rows.accepted & (rows.marks != 0)).sum()),
        "stages": stages,
        "flags": sorted((f for f in flags if f["rows"]), key=lambda f: (-f["rows"], f["code"])),
    }


def _count(rows: Rows, code: str, chosen: np.ndarray) -> Entry:
    size = int(chosen.sum())
    known = size and not np.isnan(rows.values["duration_s"][chosen]).all()
    return {"code": code, "rows": size, "hours": rows.hours(chosen) if known else None}


def histograms(rows: Rows, found: Sequence[Rule]) -> dict[str, Entry]:
    """For each signal that was measured: bin edges, and rows per bin that were kept, that this filter dropped or
    flagged, and that something else did. The first threshold is an edge; what lies outside is in the end bins."""
    out: dict[str, Entry] = {}
    for name, values in rows.values.items():
        known = np.isfinite(values)
        if not known.any():
            continue
        mine = [rule for rule in found if rule.signal == name]
        ours = known & ~rows.kept & (rows.marks & rows.bits(rule.code for rule in mine) != 0)
        edges = _edges(values[known], values[ours], mine)
        parts = {"kept": known & rows.kept, "this": ours, "other": known & ~rows.kept & ~ours}
        inside = {k: np.clip(values[part], edges[0], edges[-1]) for k, part in parts.items()}
        marks = [{"setting": r.setting, "limit": r.limit, "sign": r.sign, "unit": r.unit} for r in mine]
        out[name] = {
            "edges": [float(f"{edge:.6g}") for edge in edges],
            **{k: np.histogram(part, edges)[0].tolist() for k, part in inside.items()},
            "thresholds": marks,
            "rows": int(known.sum()),
            "median": float(f"{np.median(values[known]):.6g}"),
        }
    return out


def _edges(values: np.ndarray, dropped: np.ndarray, mine: Sequence[Rule]) -> np.ndarray:
    """Ascending bin edges around the bulk of a signal, what its filters dropped, and thresholds that are near."""
    low, high = np.quantile(values, [0.002, 0.998])
    if len(dropped):
        low, high = min(low, np.quantile(dropped, 0.02)), max(high, np.quantile(dropped, 0.98))
    reach = max(high - low, 0.1 * abs(high), 1e-9)
    if high - low < 1e-9 and mine:  # all equal: the nearest threshold is all there is to see
        reach = max(reach, min(abs(rule.limit - low) for rule in mine))
    near = [rule.limit for rule in mine if low - 2 * reach <= rule.limit <= high + 2 * reach]
    low, high = min([low, *near]), max([high, *near])
    width = max(high - low, 0.05 * abs(high), 1e-6) / BINS
    start = near[0] if near else low
    first, last = math.floor((low - start) / width - 0.5), math.ceil((high - start) / width + 0.5)
    return start + width * np.arange(first, last + 1)


def moves(rows: Rows, found: Sequence[Rule]) -> dict[str, Entry]:
    """By setting: how many rows and hours a neighbouring threshold would lose, and how many it would take in.

    A row is taken in when nothing but this setting stands against it; duplicates are not looked for anew.
    """
    passed = {rule: rule.passes(rows) for rule in found}
    broken = sum((~good).astype(np.int16) for good in passed.values())
    out: dict[str, Entry] = {}
    for setting in dict.fromkeys(rule.setting for rule in found):
        mine = [rule for rule in found if rule.setting == setting]
        others = broken - sum((~passed[rule]).astype(np.int16) for rule in mine)
        foreign = rows.marks & ~rows.bits(rule.code for rule in mine)
        only = (rows.marks != 0) & (foreign == 0) & (others == 0) & ~np.isnan(rows.values["duration_s"])
        tried = []
        for limit in neighbours(mine[0], rows):
            good = np.logical_and.reduce([rule.passes(rows, limit) for rule in mine])
            gained, lost = only & good, rows.kept & ~good
            counts = {"gained": int(gained.sum()), "lost": int(lost.sum())}
            hours = {"gained_hours": rows.hours(gained), "lost_hours": rows.hours(lost)}
            tried.append({"limit": limit, **counts, **hours})
        unit, codes = mine[0].unit, sorted({rule.code for rule in mine})
        signals = [rule.signal for rule in mine]
        quiet = _quiet(rows, mine, only & ~np.logical_and.reduce([passed[rule] for rule in mine]))
        out[setting] = {
            "limit": mine[0].limit, "unit": unit, "codes": codes, "signals": signals, "quiet": quiet, "tried": tried,
        }  # fmt: skip
    return out


def _quiet(rows: Rows, mine: Sequence[Rule], out: np.ndarray) -> list[float | None]:
    """The values next to a threshold, below and above it: of a row that it keeps out, and of one that it lets in.

    While the threshold stays between them nothing changes; None where there is no such row.
    """
    sign = mine[0].sign
    weakest = np.min([sign * rows.values[rule.signal] for rule in mine], axis=0)
    inside, outside = weakest[rows.kept & np.isfinite(weakest)], weakest[out & np.isfinite(weakest)]
    ends = [float(outside.max()) if len(outside) else None, float(inside.min()) if len(inside) else None]
    rounded = [None if end is None else float(f"{sign * end:.4g}") for end in ends]
    return rounded[::sign]


def neighbours(rule: Rule, rows: Rows) -> list[float]:
    """Thresholds beside a rule's, ascending, in round steps of about a tenth; those the setting allows."""
    size = abs(rule.limit)
    if size == 0:
        known = rows.values[rule.signal][np.isfinite(rows.values[rule.signal])]
        size = float(np.median(np.abs(known))) if len(known) else 0.0
    if size == 0:
        return []
    step = _round_step(size / 10)
    tried = [float(f"{rule.limit + step * i:.6g}") for i in STEPS]
    return [limit for limit in tried if _allowed(rule.setting, limit)]


def _round_step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return power * max(digit for digit in (1, 2, 5) if digit * power <= size * (1 + 1e-9))


def _allowed(setting: str, limit: float) -> bool:
    if setting not in FilterConfig.model_fields:
        return True
    try:
        FilterConfig.model_validate({setting: limit})
    except pydantic.ValidationError:
        return False
    return True


def borderline(rows: Rows, rule: Rule, count: int) -> tuple[list[int], list[int]]:
    """Row numbers nearest to a threshold: dropped or flagged by it, and kept; nearest first."""
    margin = np.abs(rows.values[rule.signal] - rule.limit)
    coded = rows.marks & rows.bits([rule.code]) != 0
    dropped, kept = coded & ~rule.passes(rows), rows.kept & rule.passes(rows)
    return _smallest(margin, dropped, count), _smallest(margin, kept, count)


def _smallest(margin: np.ndarray, chosen: np.ndarray, count: int) -> list[int]:
    places = np.flatnonzero(chosen & np.isfinite(margin))
    if len(places) > count:
        places = places[np.argpartition(margin[places], count - 1)[:count]]
    return [int(i) for i in places[np.lexsort((places, margin[places]))]]


def labels(rows: Rows) -> Entry:
    """Accepted rows by label and split, and how many of each label were rejected; commonest first."""
    sizes: Counter[str] = Counter()
    for (split, _), count in rows.splits.items():
        sizes[split] += count
    named = {split for split, _ in sizes.most_common(MAX_SPLITS)}
    splits: dict[str, Entry] = {}
    for split, taken in sorted(rows.splits, key=lambda s: (s[0] not in named, -sizes[s[0]], s)):
        part = splits.setdefault(split if split in named else OTHER_SPLITS, {"accepted": 0, "rejected": 0})
        part["accepted" if taken else "rejected"] += rows.splits[split, taken]
    table: dict[str, Entry] = {}
    for (label, split, taken), count in rows.labels.items():
        row = table.setdefault(label, {"label": label, "accepted": 0, "rejected": 0, "splits": Counter()})
        row["accepted" if taken else "rejected"] += count
        if taken:
            row["splits"][split if split in named else OTHER_SPLITS] += count
    ordered = sorted(table.values(), key=lambda row: (-row["accepted"], -row["rejected"], row["label"]))
    shown = [row | {"splits": dict(row["splits"])} for row in ordered[:MAX_LABELS]]
    return {"splits": splits, "labels": len(ordered), "rows": shown}


def duplicates(rows: Rows) -> tuple[Entry, list[list[int]]]:
    """Counts of duplicate groups (a kept clip and those dropped for it); and the groups themselves, as places in
    `rows.duplicates`: those across splits first, then the largest."""
    d = rows.duplicates
    groups: dict[str, list[int]] = {}
    for place, kept in enumerate(d.kept):
        groups.setdefault(kept, []).append(place)
    across = Counter((d.split[i], d.kept_split[i]) for i in range(len(d.row)) if d.split[i] != d.kept_split[i])
    sizes = Counter(len(group) + 1 for group in groups.values())
    ordered = sorted(groups.values(), key=lambda group: (-len({d.code[i] for i in group}), -len(group), group[0]))
    figures = {
        "groups": len(groups),
        "dropped": len(d.row),
        "by_code": dict(Counter(d.code).most_common()),
        "sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "across_splits": [{"dropped": a, "kept": b, "rows": n} for (a, b), n in across.most_common(MAX_SPLITS)],
    }
    return figures, ordered


def varied(rows: Rows, groups: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most `count` groups, taken in turn from those of each code."""
    by_code: dict[str, list[list[int]]] = {}
    for group in groups:
        by_code.setdefault(rows.duplicates.code[group[0]], []).append(group)
    rounds = range(max((len(part) for part in by_code.values()), default=0))
    in_turn: list[list[int]] = []
    for i in rounds:
        in_turn += [by_code[code][i] for code in sorted(by_code) if i < len(by_code[code])]
    return in_turn[:count]


def correspondence(result: Mapping[str, Any]) -> Entry | None:
    """The null of shuffled pairs beside the true pairs, as histograms on common edges; None when there is none.

    result["correspondence"]: threshold, false_accept_rate, and `null` and `matched`: scores, or counts when `edges`
    is there.
    """
    given = dict(result.get("correspondence") or {})
    if not given.get("null") or not given.get("matched"):
        return None
    if "edges" not in given:
        both = [np.asarray(given[name], float) for name in ("null", "matched")]
        low, high = (f(np.concatenate(both)) for f in (np.min, np.max))
        edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
        counted = [np.histogram(part, edges)[0].tolist() for part in both]
        given |= {"edges": [float(f"{e:.6g}") for e in edges], "null": counted[0], "matched": counted[1]}
    return given
