"""Evaluation under kills and at length: the long evidence (make accept), and a sample of it."""

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from aai import schema, storage
from aai.features import METADATA_KEY, SHAPES_KEY, FeatureManifest
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import encode_flac
from pipelines import featurize
from pipelines.__main__ import main
from pipelines.featurize import FeaturizeConfig
from tests import tiny
from tests.e2e.test_curation import aai, finish, kill_at
from tests.pipelines.conftest import run_here

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "accept-evaluation"
"""Where the long tests keep their results."""
PICTURES = "{sound: 12, ceiling: 8, shuffled_audio: 8, random_token: 8, edit: 6, stylize: 6}"


def write_world(root: Path, clips: int) -> dict[str, str]:
    """clips, features and bundle of a small world; a third of the clips is held out."""
    clip = tiny.write_clip(root / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(root / "diffusion", clip)))
    table = tiny.write_clip_table(root / "accepted", clips // 12, 12, splits_in_turn=("train", "train", "test"))
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        settings = {"input": str(table), "out": str(root / "features"), "foundation": spec.model_dump()}
        featurize.run(FeaturizeConfig.parse(settings))
    bundle = tiny.write_bundle_of(root / "bundle", spec)
    return {"clips": str(table), "features": str(root / "features"), "bundle": str(bundle)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("world"), 72)


def arguments(world: dict[str, str], out: Path, **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """Of `aai evaluate`: flags, and settings as for --set."""
    values: dict[str, Any] = {
        "clips": world["clips"], "pictures": PICTURES, "request__steps": 3, "cases_per_shard": 2,
        "clips_per_shard": 4, "tracking__uri": f"sqlite:///{out.parent}/mlflow.db", **settings,
    }  # fmt: skip
    return ["--features", world["features"], "--bundle", world["bundle"], "--out", str(out)], values


def start(world: dict[str, str], out: Path, **settings: Any) -> "subprocess.Popen[bytes]":
    """Starts `aai evaluate` in a process group of its own."""
    flags, values = arguments(world, out, **settings)
    return aai("evaluate", *flags, **values)


def evaluate_here(world: dict[str, str], out: Path) -> None:
    """The same without Ray and in this process, one shard after the other."""
    flags, values = arguments(world, out)
    sets = [part for name, value in values.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        assert main(["evaluate", *flags, *sets]) == 0


def made(out: Path) -> dict[str, Any]:
    """Everything that an evaluation made, in a form that can be compared: tables by row, figures without times."""
    found: dict[str, Any] = {}
    for folder, key in (("heard", "row"), ("pictures", "case"), ("inputs", "row")):
        for file in storage.list_files(str(out / folder), ".parquet"):
            found[f"{folder}/{Path(file).name}"] = storage.read_table(file).sort_by(key).to_pylist()
    result = storage.read_json(str(out / "evaluate.json"))
    return found | {"result": {name: value for name, value in result.items() if name not in ("seconds", "written_by")}}


def drivers(driver: psutil.Process) -> list[psutil.Process]:
    """The command that the user started."""
    return [driver]


def test_a_killed_evaluation_goes_on_and_ends_the_same(world: dict[str, str], tmp_path: Path) -> None:
    """One sample of the kill runs: the driver, while it paints."""
    evaluate_here(world, tmp_path / "whole")
    driver = start(world, tmp_path / "killed")
    while driver.poll() is None and not list((tmp_path / "killed").glob("pictures/*.parquet")):
        time.sleep(0.05)
    assert kill_at(0, driver, drivers)
    driver.wait()
    painted = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("pictures/*.parquet")}
    assert 0 < len(painted) < 24
    again = start(world, tmp_path / "killed", cluster__num_workers=1)
    assert finish(again, lambda: start(world, tmp_path / "killed")) == 1
    assert made(tmp_path / "killed") == made(tmp_path / "whole")
    assert painted == {path: path.stat().st_mtime_ns for path in painted}


def finished(out: Path) -> int:
    """How many files of work are done."""
    return len(list(out.glob("heard/*.parquet"))) + len(list(out.glob("pictures/*.parquet")))


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_h5_five_kills_at_random_times(tmp_path: Path) -> None:
    """The pictures' table and all figures equal those of the undisturbed run."""
    world, rng, rows = write_world(tmp_path / "world", 240), random.Random(5), []
    assert start(world, tmp_path / "whole").wait(timeout=900) == 0
    whole, files = made(tmp_path / "whole"), finished(tmp_path / "whole")
    for number in range(5):
        out, after = tmp_path / f"run{number}", rng.randrange(files)
        driver = start(world, out)
        while driver.poll() is None and finished(out) < after:  # by progress: seconds differ from run to run
            time.sleep(0.05)
        struck = kill_at(rng.random(), driver, drivers)
        done = finished(out)
        runs = finish(driver, lambda out=out: start(world, out))  # type: ignore[misc]
        rows.append({"done": done, "of": files, "struck": struck, "runs": runs, "same": made(out) == whole})
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "kills.json").write_text(json.dumps(rows, indent=1))
    assert all(row["same"] for row in rows), rows
    assert sum(row["struck"] for row in rows) >= 4, rows


def repeat_world(world: dict[str, str], root: Path, held_out: int) -> dict[str, str]:
    """Many clips with 10 s of sound, made from few: their ids differ, their content repeats every 16 rows."""
    rng, rows_per_file = np.random.default_rng(0), 1000
    sounds = [encode_flac((0.1 * rng.standard_normal(160_000)).astype(np.float32), 16_000) for _ in range(16)]
    clip = storage.read_table(world["clips"]).slice(0, 1).to_pylist()[0]
    feature_file = storage.list_files(world["features"], ".parquet")[0]
    one, footer = storage.read_table(feature_file).slice(0, 1), storage.read_table(feature_file).schema.metadata
    for start_row in range(0, held_out + rows_per_file, rows_per_file):
        split = "test" if start_row < held_out else "train"
        ids = [f"clip-{number:06d}" for number in range(start_row, start_row + rows_per_file)]
        audio = [sounds[number % 16] for number in range(rows_per_file)]
        clips = [{**clip, "clip_id": name, "content_hash": name, "split": split, "audio": b"-"} for name in ids]
        storage.write_table(f"{root}/accepted/{ids[0]}.parquet", pa.Table.from_pylist(clips, schema.CLIP_TABLE))
        table = one.take(pa.array(np.zeros(rows_per_file, np.int64)))
        for name, values in (("clip_id", ids), ("content_hash", ids), ("audio", audio), ("split", [split] * len(ids))):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
        kept = {key: footer[key] for key in (METADATA_KEY, SHAPES_KEY)}
        storage.write_table(f"{root}/features/{ids[0]}.parquet", table.replace_schema_metadata(kept))
    manifest = FeatureManifest.read(world["features"]).model_dump(mode="json")
    manifest |= {"rows": {"test": held_out, "train": rows_per_file}, "fingerprint": f"repeated-{held_out}"}
    storage.write_json(f"{root}/features/manifest.json", manifest)
    return {"clips": f"{root}/accepted", "features": f"{root}/features", "bundle": world["bundle"]}


@pytest.mark.accept
@pytest.mark.timeout(5400)
def test_h5_thirty_thousand_clips_in_a_small_driver(world: dict[str, str], tmp_path: Path) -> None:
    """30,000 held-out clips with 10 s of FLAC: the driver stays below 1.5 GB."""
    many = repeat_world(world, tmp_path / "many", 30_000)
    settings = {"max_clips": 30_000, "pictures": "{sound: 20, ceiling: 20}", "clips_per_shard": 256}
    driver = start(many, tmp_path / "out", **settings)
    process, peak, begin = psutil.Process(driver.pid), 0, time.monotonic()
    while driver.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.2)
    assert driver.wait() == 0
    result = storage.read_json(str(tmp_path / "out" / "evaluate.json"))
    row = {
        "clips": result["retrieval"]["gallery"],
        "audio_gb": 30_000 * 160_000 * 2 / 1e9,
        "driver_rss_gb": round(peak / 1e9, 3),
        "seconds": round(time.monotonic() - begin),
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "many.json").write_text(json.dumps(row, indent=1))
    assert row["clips"] == 30_000
    assert row["driver_rss_gb"] < 1.5, row
    # Another number of workers keeps the finished result.
    before = (tmp_path / "out" / "evaluate.json").read_bytes()
    begin = time.monotonic()
    assert start(many, tmp_path / "out", **settings, cluster__num_workers=4).wait(timeout=300) == 0
    assert time.monotonic() - begin < 120
    assert (tmp_path / "out" / "evaluate.json").read_bytes() == before


def test_the_repeated_world_is_what_it_says(world: dict[str, str], tmp_path: Path) -> None:
    table = storage.read_table(repeat_world(world, tmp_path, 1000)["features"])
    assert len(set(table["clip_id"].to_pylist())) == 2000
    assert min(len(data) for data in table["audio"].to_pylist()) > 100_000  # 10 s of noise
