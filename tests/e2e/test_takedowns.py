"""Lineage on a demo against lists made by other means (make accept): DuckDB on the tables, the demo's own files.

AAI_DEMO names the run folder of a finished demo (else one is made in runs/accept).
"""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from aai import storage
from aai.bundle import read_bundle
from aai.proof import read_made
from pipelines.settings import TrackingConfig
from pipelines.tracing.walks import origin_of, origin_of_picture, spread_of

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("AAI_DEMO", ROOT / "runs" / "accept"))
CFG = TrackingConfig(uri=f"sqlite:///{RUN}/mlflow.db", model_name="aai-demo")


@pytest.fixture(scope="module", autouse=True)
def demo() -> None:
    if not (RUN / "promote" / "promote.json").exists():
        subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)


def by_hand(query: str) -> set[str]:
    return {row[0] for row in duckdb.sql(query).fetchall()}


def table(name: str) -> str:
    return f"read_parquet('{RUN}/{name}/*.parquet', union_by_name=true)"


def test_m7_a_version_has_the_clips_of_its_table() -> None:
    sha = read_bundle(RUN / "adapt" / "bundle").sha
    origin = origin_of(CFG, sha, storage.read_json(f"{RUN}/adapt/adapt.json")["data_fingerprint"])
    wanted = by_hand(f"select clip_id from {table('features')} where split in ('train', 'val')")
    assert set(origin.clips["clip_id"].to_pylist()) == wanted
    assert len(origin.clips) == len(wanted) > 1000
    assert origin.unknown == ()
    print(f"{len(wanted)} clips of a version, equal to those by hand")


def test_m7_fifty_clips() -> None:
    accepted = sorted(by_hand(f"select clip_id from {table('curated/accepted')}"))
    learned = by_hand(f"select clip_id from {table('features')} where split in ('train', 'val')")
    reached = 0
    for clip in random.Random(0).sample(accepted, 50):
        spread = spread_of(CFG, frozenset([clip]), [f"{RUN}/curated"])
        counts = {Path(each.uri).relative_to(RUN).as_posix(): len(each.clips) for each in spread.holdings}
        wanted = {}
        for name in ("features", "curated/accepted", "curated/rejected", "curated/_measured", "features-aligned"):
            files = f"{name}/*" if name == "features-aligned" else name
            if rows := duckdb.sql(f"select count(*) from {table(files)} where clip_id = '{clip}'").fetchall()[0][0]:
                wanted[name] = rows
        assert counts == wanted
        assert bool(spread.trainings) == bool(spread.versions) == (clip in learned)
        reached += clip in learned
    assert 0 < reached < 50
    print(
        f"50 clips: tables equal to those by hand; {reached} of train and val lead to the version, the others to none"
    )


def test_m7_takedown_of_a_list(tmp_path: Path) -> None:
    names = sorted(by_hand(f"select uri from {table('curated/accepted')}"))
    names += sorted(by_hand(f"select uri from {table('curated/rejected')} where clip_id is null"))[:3]
    wanted = frozenset(random.Random(1).sample(names, 40))
    told = {each.uri: each.by_split() for each in spread_of(CFG, wanted, [f"{RUN}/curated"]).holdings}
    listed = ", ".join(f"'{name}'" for name in wanted)
    both = " union all ".join(
        f"select uri, content_hash from {table(f'curated/{kind}')}" for kind in ("accepted", "rejected")
    )
    contents = f"select content_hash from ({both}) where uri in ({listed})"
    for name in ("features", "curated/accepted", "curated/rejected"):
        which = f"uri in ({listed}) or content_hash in ({contents})"
        rows = duckdb.sql(f"select split, count(*) from {table(name)} where {which} group by split").fetchall()
        assert told.get(f"{RUN}/{name}", {}) == dict(rows), name
    print(f"40 URIs, their copies with them: {told}")


def test_m7_twenty_pictures(tmp_path: Path) -> None:
    sha = read_bundle(RUN / "adapt" / "bundle").sha
    wanted = by_hand(f"select clip_id from {table('features')} where split in ('train', 'val')")
    sound = RUN / "pictures" / "sound0.wav"
    words = ["--audio", str(sound), "--num-images", "4", "--out", str(tmp_path), "--set", f"run_dir={RUN}"]
    for seed in range(0, 20, 4):
        command = [
            sys.executable,
            "-m",
            "pipelines",
            "generate",
            *words,
            "--seed",
            str(seed),
            "--set",
            "request.steps=2",
        ]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 20
    for picture in pictures:
        made = read_made(picture.read_bytes())
        assert made["sounds"] == {"sound": hashlib.sha256(sound.read_bytes()).hexdigest()}
        origin, versions = origin_of_picture(CFG, made)
        assert [version.tags["bundle_sha"] for version in versions] == [sha]
        assert set(origin.clips["clip_id"].to_pylist()) == wanted
