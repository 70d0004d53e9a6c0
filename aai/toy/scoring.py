"""Scores curation against the defects that the toy world planted."""

import os
from collections import defaultdict
from typing import Any

from aai import storage

UNSEEN_CODES = ("WRONG_AUDIO",)
"""Defects that only a trained aligner can notice; they are counted apart."""


def score_defects(defects_json: str, out: str) -> dict[str, Any]:
    """Compares defects.json of a world with the accepted/ and rejected/ tables under `out`.

    A planted defect is found when its row was rejected with the right code; of two duplicates either may be the one
    that was dropped. Precision counts the rejected rows that were planted. Returns `recall`, `precision`, `planted`,
    `found`, `false_rejects` (URIs), `kinds` {kind: planted, found, missed URIs; for defects also `precision`: which
    share of the rows rejected with its code had it} and `unseen`. An oddity, to be accepted, is found when it was.
    A defect that needs a trained aligner counts among `unseen`, {kind: planted, found}, unless one was there.
    """
    base = os.path.dirname(storage.absolute(defects_json))
    codes = _codes(out)
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"planted": 0, "found": 0, "missed": []})
    unseen: dict[str, dict[str, int]] = defaultdict(lambda: {"planted": 0, "found": 0})
    explained, by_code = set(), defaultdict(set)
    hidden = () if _correspondence_was_judged(out) else UNSEEN_CODES
    planted = found = 0
    for defect in storage.read_json(defects_json):
        uris = [storage.join(base, name) for name in (defect["uri"], defect.get("pair")) if name]
        if defect["expect"] == "accept":
            hit = codes.get(uris[0], "MISSING") is None
        else:
            explained.update(uris)
            by_code[defect["code"]].update(uris)
            hit = any(codes.get(uri) == defect["code"] for uri in uris)
        if defect["code"] in hidden:
            unseen[defect["kind"]]["planted"] += 1
            unseen[defect["kind"]]["found"] += hit
            continue
        kind = kinds[defect["kind"]]
        kind["planted"] += 1
        kind["found"] += hit
        if not hit:
            kind["missed"].append(uris[0])
        if defect["expect"] == "reject":
            kind["code"] = defect["code"]
            planted, found = planted + 1, found + hit
    for kind in kinds.values():
        if code := kind.pop("code", None):
            named = {uri for uri, given in codes.items() if given == code}
            kind["precision"] = len(named & by_code[code]) / len(named) if named else 1.0
    rejected = {uri for uri, code in codes.items() if code}
    return {
        "recall": found / planted if planted else 1.0,
        "precision": len(rejected & explained) / len(rejected) if rejected else 1.0,
        "planted": planted,
        "found": found,
        "false_rejects": sorted(rejected - explained),
        "kinds": dict(kinds),
        "unseen": dict(unseen),
    }


def _correspondence_was_judged(out: str) -> bool:
    result = storage.join(out, "curate.json")
    return storage.exists(result) and bool(storage.read_json(result).get("correspondence"))


def _codes(out: str) -> dict[str, str | None]:
    """{uri: reject code, or None when accepted}."""
    accepted = storage.read_table(storage.join(out, "accepted"), ["uri"])
    rejected = storage.read_table(storage.join(out, "rejected"), ["uri", "code"])
    return dict.fromkeys(accepted["uri"].to_pylist()) | dict(
        zip(rejected["uri"].to_pylist(), rejected["code"].to_pylist(), strict=True)
    )
