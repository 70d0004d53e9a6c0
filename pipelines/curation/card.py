"""The data card of curated tables: what went in, what stayed, what each filter did and would do otherwise.

One HTML page that needs nothing else, and card.json with all its figures.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from aai import storage
from pipelines.curation import card_columns, croissant
from pipelines.curation import card_figures as figures_of
from pipelines.curation.card_data import Entry, Rows, fetch, locate, read_rows
from pipelines.curation.card_figures import Rule
from pipelines.curation.croissant import AboutConfig
from pipelines.pages.page import environment
from pipelines.pages.plots import COLOURS, histogram, thumbnail
from pipelines.settings import RunsConfig

log = logging.getLogger(__name__)

PAGE, FIGURES = "card.html", "card.json"
VERSION = 1
NEAR_DROPPED, NEAR_KEPT = 8, 4
"""Borderline clips shown of every filter."""
GROUPS, GROUP_DROPPED = 12, 3
"""Duplicate groups shown, and dropped clips of each."""
EXAMPLES = 3
"""Rows shown of a reject code that no threshold stands for."""
TRANSIENT = 8
LABELS = 40
"""Labels shown at once; the next ones are folded away, up to FOLDED."""
FOLDED = 400
Clips = Mapping[int, Entry]
"""The clips that are shown, by the number of their row."""
KEPT, THIS, ELSE = COLOURS[0], COLOURS[1], "#8d929b"
_NOTHING_SAID = AboutConfig()


def write_card(
    out: str,
    config_filters: Mapping[str, Any],
    result: Mapping[str, Any],
    rows: Rows | None = None,
    about: AboutConfig = _NOTHING_SAID,
) -> dict[str, Any]:
    """Writes OUT/card.json, OUT/card.html and OUT/croissant.json about OUT/accepted and OUT/rejected; returns what
    card.json holds.

    config_filters: the thresholds (FilterConfig as a mapping; null = not in force). result: what curate.json holds;
    `correspondence` in it, where there is one, has threshold, false_accept_rate, null and matched. rows: the tables'
    small columns, where they are known already; otherwise they are read. about: for croissant.json.
    """
    rows = rows or read_rows(out, list(result.get("signals", ())))
    found = figures_of.rules(config_filters, result)
    groups, ordered = figures_of.duplicates(rows)
    card: dict[str, Any] = {
        "version": VERSION,
        "out": out,
        "filters": dict(config_filters),
        "funnel": figures_of.funnel(rows),
        "signals": figures_of.histograms(rows, found),
        "thresholds": figures_of.moves(rows, found),
        "labels": figures_of.labels(rows),
        "correspondence": figures_of.correspondence(result),
        "pictures": _pictures(result),
        "val_share": result.get("chosen", {}).get("val_share"),
        "duplicates": groups,
        "columns": card_columns.columns(out, result.get("columns", {})),
        "own_signals": result.get("signals", {}),
    }
    card |= _samples(rows, found, ordered)
    storage.write_bytes(storage.join(out, PAGE), render(card).encode())
    card = _without_pictures(card)
    storage.write_json(storage.join(out, FIGURES), card)
    storage.write_json(storage.join(out, croissant.FILE), croissant.describe(about, card, result))
    log.info("card: %s", storage.join(out, PAGE))
    return card


def _pictures(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """How large the pictures are kept, why, and how many sources are smaller; None for results of before."""
    if "small_sources" not in result:
        return None
    size = result["chosen"]["decode.frame_size_px"]
    return {"size_px": int(size["value"]), "why": size["why"], "small_sources": result["small_sources"]}


def log_card(cfg: RunsConfig, run_name: str, out: str, figures: Mapping[str, Any]) -> str:
    """Logs the files of `write_card` and its counts as an MLflow run; returns the run's id. Raises UserError."""
    from pipelines.registry import tracking  # only here: it takes seconds to import

    funnel = figures["funnel"]
    totals = {k: v for k, v in funnel.items() if not isinstance(v, list)}
    by_code: dict[str, int] = {}
    for stage in funnel["stages"]:
        by_code |= {code["code"]: code["rows"] for code in stage["codes"]}
    flags = {flag["code"]: flag["rows"] for flag in funnel["flags"]}
    with tracking.run(cfg, run_name, {"out": out, "filters": figures["filters"]}, {"stage": "curate"}) as run:
        duplicates = {k: figures["duplicates"][k] for k in ("groups", "dropped")}
        run.log_metrics({**totals, "by_code": by_code, "flags": flags, "duplicates": duplicates})
        for name in (PAGE, FIGURES, croissant.FILE):
            run.log_artifact(storage.join(out, name))
        return run.run_id


def _samples(rows: Rows, found: Sequence[Rule], groups: Sequence[list[int]]) -> dict[str, Any]:
    """Single clips, with pictures: borderline ones, duplicate groups, examples of other codes and transient errors."""
    near: list[tuple[Rule, list[int], list[int]]] = []
    wanted: set[int] = set()
    for rule in found:
        dropped, kept = figures_of.borderline(rows, rule, NEAR_DROPPED)
        if dropped:
            near.append((rule, dropped, kept[:NEAR_KEPT]))
            wanted.update(dropped, kept[:NEAR_KEPT])
    shown = figures_of.varied(rows, groups, GROUPS)
    d = rows.duplicates
    kept_rows = locate(rows, (d.kept[group[0]] for group in shown))
    wanted.update(kept_rows.values())
    for group in shown:
        wanted.update(d.row[i] for i in group[:GROUP_DROPPED])
    clips = {row: _with_thumbnail(entry) for row, entry in fetch(rows, wanted).items()}
    return {
        "borderline": [_borderline(rows, clips, *of_rule) for of_rule in near],
        "duplicate_groups": [_group(rows, clips, kept_rows, group) for group in shown],
        **_examples(rows, found),
    }


def _borderline(rows: Rows, clips: Clips, rule: Rule, dropped: Sequence[int], kept: Sequence[int]) -> Entry:
    """The clips nearest to one threshold on either side, with their values."""
    about = {name: getattr(rule, name) for name in ("code", "signal", "setting", "unit", "sign", "limit")}
    values = rows.values[rule.signal]
    sides = {}
    for name, chosen in (("dropped", dropped), ("kept", kept)):
        sides[name] = [clips[i] | {"value": float(values[i])} for i in chosen]
    return about | sides


def _group(rows: Rows, clips: Clips, kept_rows: Mapping[str, int], group: Sequence[int]) -> Entry:
    """A duplicate group: the kept clip beside some of the dropped ones."""
    d = rows.duplicates
    return {
        "code": d.code[group[0]],
        "kept": clips.get(kept_rows.get(d.kept[group[0]], -1)),
        "dropped": [clips[d.row[i]] for i in group[:GROUP_DROPPED]],
        "more": max(0, len(group) - GROUP_DROPPED),
    }


def _examples(rows: Rows, found: Sequence[Rule]) -> dict[str, Any]:
    """A few rows, without pictures, of each code that no threshold stands for, and of what failed for a while only."""
    plain: dict[str, list[int]] = {}
    broken: dict[str, list[int]] = {}
    wanted: list[int] = []
    for code in rows.codes:
        plain[code], broken[code] = _plain_rows(rows, found, code), _transient_rows(rows, code)
        wanted += [*plain[code], *broken[code]]
    texts = fetch(rows, wanted, False)  # all at once: each file is opened once
    examples: dict[str, list[Entry]] = {}
    transient: list[Entry] = []
    for code in rows.codes:
        if plain[code]:
            examples[code] = [texts[i] for i in plain[code]]
        if broken[code]:
            shown = [texts[i] for i in broken[code]]
            transient.append({"code": code, "rows": _number(rows, code, rows.transient), "examples": shown})
    return {"examples": examples, "transient": transient}


def _plain_rows(rows: Rows, found: Sequence[Rule], code: str) -> list[int]:
    """A few rows with a code that neither a threshold nor a duplicate explains, at even distances."""
    if code in {rule.code for rule in found} | set(rows.duplicates.code):
        return []
    chosen = ~rows.accepted & ~rows.transient & (rows.marks == rows.bits([code]))
    return _spread(chosen, EXAMPLES)


def _transient_rows(rows: Rows, code: str) -> list[int]:
    return _spread(rows.transient & (rows.marks == rows.bits([code])), TRANSIENT)


def _number(rows: Rows, code: str, chosen: Any) -> int:
    return int((chosen & (rows.marks == rows.bits([code]))).sum())


def _spread(chosen: Any, count: int) -> list[int]:
    places = chosen.nonzero()[0]
    return [int(places[i * len(places) // count]) for i in range(count)] if len(places) > count else places.tolist()


def _with_thumbnail(entry: Entry) -> Entry:
    return entry | {"picture": thumbnail(entry["picture"], 112) if entry["picture"] else None}


def _without_pictures(value: Any) -> Any:
    """The same figures without what only the page shows."""
    if isinstance(value, dict):
        return {k: _without_pictures(v) for k, v in value.items() if k != "picture"}
    return [_without_pictures(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- the page


def render(card: Mapping[str, Any]) -> str:
    """The page as HTML."""
    env = environment()
    env.filters |= {"signed": _signed, "hours": _hours}
    judged = [name for name, s in card["signals"].items() if s["thresholds"]]
    plots = {name: _plot(name, card["signals"][name]) for name in card["signals"]}
    labels = card["labels"]["rows"]
    return (
        env.get_template("card.html.jinja")
        .render(
            card=card,
            funnel=card["funnel"],
            plots=plots,
            judged=judged,
            moves_of=_moves_of(card),
            labels=labels[:LABELS],
            folded=labels[LABELS : LABELS + FOLDED],
            pairs=_pairs_plot(card["correspondence"]),
            most=max((row["accepted"] for row in labels), default=1) or 1,
        )
        .lstrip()
    )


def _moves_of(card: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """By signal: the thresholds whose moving is told below its histogram; each setting once."""
    out: dict[str, list[Entry]] = {}
    for setting, move in card["thresholds"].items():
        out.setdefault(move["signals"][0], []).append({"setting": setting, **move})
    return out


def _plot(name: str, signal: Mapping[str, Any]) -> Markup:
    """The histogram of one signal with its thresholds."""
    inside = {t["setting"]: t["limit"] for t in signal["thresholds"]}
    low, high = signal["edges"][0], signal["edges"][-1]
    marks = {f"{k} {v:g}": v for k, v in inside.items() if low <= v <= high}
    stacks, colours = {"kept": signal["kept"]}, [KEPT]
    for key, text, colour in (("this", "dropped by this filter", THIS), ("other", "dropped for another reason", ELSE)):
        if sum(signal[key]):
            stacks[text] = signal[key]
            colours.append(colour)
    unit = signal["thresholds"][0]["unit"] if signal["thresholds"] else ""
    return histogram(signal["edges"], stacks, name, unit, marks=marks, colours=colours)


def _pairs_plot(found: Mapping[str, Any] | None) -> Markup | None:
    """Scores of shuffled pairs over those of true pairs, each as a share of its own number."""
    if found is None:
        return None
    shares = {}
    for key, text in (("null", "shuffled pairs"), ("matched", "true pairs")):
        total = max(1, sum(found[key]))
        shares[text] = [count / total for count in found[key]]
    threshold = found.get("threshold")
    marks = {} if threshold is None else {f"threshold {threshold:.3g}": threshold}
    title = "Likeness of sound and pictures"
    return histogram(found["edges"], shares, title, "av_similarity", "share", marks, (ELSE, KEPT), beside=True)


def _signed(value: int, sign: str) -> str:
    """12 -> +12 or − 12; nothing for 0."""
    return f"{sign}{value:,}" if value else "·"


def _hours(value: float | None) -> str:
    """Hours for people: 0.0041 -> 15 s, 0.22 -> 13 min, 31.4 -> 31.4 h."""
    if value is None:
        return "–"
    if value < 1 / 60:
        return f"{3600 * value:.0f}\u00a0s"
    return f"{60 * value:.1f}\u00a0min" if value < 1 else f"{value:,.1f}\u00a0h"
