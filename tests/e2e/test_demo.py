"""The whole chain as `aai demo` runs it, on a small world: real clips, Ray, MLflow and diffusion, few steps."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import mlcroissant
import pandas as pd
import pytest
from PIL import Image, ImageChops

from aai import storage
from aai.bundle import read_bundle
from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.sampling import PaintRequest
from pipelines import demo, status
from pipelines.__main__ import main
from pipelines.engine import cluster
from pipelines.registry import versions
from pipelines.settings import TrackingConfig

CODE = r"\d+\.\d+\.\d+ \(commit (?!unknown)\S+\)"
"""Not this process's own: somebody may commit while the stages run."""
QUICK = {
    "world": ["clips=150"],
    "curate": ["rows_per_shard=50"],
    "align": ["fit.steps=12", "fit.batch_size=32", "fit.eval_every=0"],
    "adapt": ["fit.steps=6", "fit.batch_size=16", "fit.eval_every=0"],
    "evaluate": [
        "pictures={caption: 4, sound: 12, ceiling: 4, shuffled_audio: 4, sketch: 4, edit: 4, stylize: 4}",
        "request.steps=3",
        "max_frames=40",
    ],
    "promote": ["gates=[{metric: retrieval.overlap, max: 0}]"],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def summary(run_dir: Path) -> dict[str, Any]:
    cluster.shutdown()
    return demo.run(demo.CONFIG.parse({"run_dir": str(run_dir), "overrides": QUICK}))


def test_the_card_is_valid_croissant(summary: dict[str, Any], run_dir: Path) -> None:
    issues = mlcroissant.Dataset(jsonld=run_dir / "curated/croissant.json").metadata.ctx.issues
    assert list(issues.errors) == []


def store(run_dir: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{run_dir}/mlflow.db", model_name="aai-demo")


def test_summary_holds_every_figure(summary: dict[str, Any], run_dir: Path) -> None:
    assert json.loads((run_dir / "summary.json").read_text()).keys() == summary.keys()
    assert set(summary["seconds"]) == {
        "world", "curate", "featurize", "align", "adapt", "evaluate", "promote", "generate", "total",
    }  # fmt: skip
    curate = summary["curate"]
    assert curate["rows_in"] == curate["accepted"] + curate["rejected"] == 150
    assert curate["defect_recall"] >= 0.98
    assert curate["defect_precision"] >= 0.98
    assert summary["foundation"]["judge_object"] >= 0.98
    assert summary["foundation"]["clip_object"] >= 0.5
    assert summary["foundation"]["weights_mb"] <= 32
    assert summary["retrieval"]["overlap"] == 0
    assert summary["retrieval"]["batch_invariance_max_abs"] <= 1e-4
    for way in ("a2v", "v2a", "a2t", "t2a"):
        assert {"r1", "r5", "r10", "median_rank", "ci95", "chance"} <= summary["retrieval"][way].keys()
    assert {"object", "ambience"} <= summary["generation"]["sound"].keys()
    assert {"object", "kept"} <= summary["generation"]["edit"].keys()
    assert {"ambience", "kept"} <= summary["generation"]["stylize"].keys()
    assert summary["registry"] == {"name": "aai-demo", "version": 1, "alias": "champion"}
    assert summary["peak_rss_gb"] > 0
    assert summary["pictures"]


def test_the_report_is_one_file_with_everything_in_it(summary: dict[str, Any], run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    assert "data:image/" in page
    assert 'src="http' not in page
    assert summary["registry"]["name"] in page


def test_the_feature_table_is_plain_parquet(summary: dict[str, Any], run_dir: Path) -> None:
    file = storage.list_files(str(run_dir / "features"), ".parquet")[0]
    frame = pd.read_parquet(file)
    width = len(frame["image_features"].iloc[0])
    seen = duckdb.sql(f"select count(*), min(len(image_features)) from read_parquet('{file}')").fetchall()[0]
    assert seen == (len(frame), width)


def test_a_second_run_keeps_what_is_there_and_ends_the_same_way(summary: dict[str, Any], run_dir: Path) -> None:
    again = demo.run(demo.CONFIG.parse({"run_dir": str(run_dir), "overrides": QUICK}))
    for part in ("curate", "retrieval", "generation", "registry"):
        assert again[part] == summary[part]
    assert again["seconds"]["total"] < summary["seconds"]["total"]
    assert again["first_run"]["seconds"] == summary["seconds"]


def test_a8_a_fresh_process_loads_the_champion_and_paints_the_same_picture(
    summary: dict[str, Any], run_dir: Path
) -> None:
    sound = sorted((run_dir / "pictures").glob("*.wav"))[0]
    folder = versions.resolve_bundle("models:/aai-demo@champion", store(run_dir))
    assert not [f for f in Path(folder).rglob("*") if f.suffix in (".pkl", ".pt", ".bin", ".ckpt", ".pickle")]
    code = (
        "import sys\nfrom pipelines.__main__ import main\n"
        "sys.exit(main(['generate', '--audio', sys.argv[1], '--seed', '3', '--out', sys.argv[2],"
        " '--set', 'run_dir=' + sys.argv[3]]))"
    )
    out = run_dir / "fresh"
    subprocess.run([sys.executable, "-c", code, str(sound), str(out), str(run_dir)], check=True, timeout=300)
    ours = Painter.load(folder).generate(decode_audio(sound.read_bytes(), 60, 2**25, 16_000), PaintRequest(seed=3))[0]
    assert ImageChops.difference(Image.open(next(out.glob("*.png"))), ours).getbbox() is None


def test_a8_rollback_and_promote_again_move_the_alias(summary: dict[str, Any], run_dir: Path) -> None:
    settings = ["--set", f"run_dir={run_dir}", "--set", QUICK["promote"][0]]
    assert main(["promote", *settings, "--rollback"]) == 0
    assert versions.get_alias(store(run_dir), "champion") is None
    assert main(["promote", *settings]) == 0
    assert versions.get_alias(store(run_dir), "champion") == 1


def test_a_picture_tells_how_it_was_made_and_is_never_painted_over(summary: dict[str, Any], run_dir: Path) -> None:
    sound, out = sorted((run_dir / "pictures").glob("*.wav"))[0], run_dir / "named"
    base = ["generate", "--audio", str(sound), "--out", str(out), "--set", f"run_dir={run_dir}", "--seed", "5"]
    for prompt in ("a photo of <sound>", "a sketch of <sound>", "a photo of <sound>"):
        assert main([*base, "--prompt", prompt]) == 0
    made = {file.name: json.loads(Image.open(file).text["aai"]) for file in out.glob("*.png")}
    stem = f"generate_{sound.stem}_seed5"
    assert {name: facts["prompt"] for name, facts in made.items()} == {
        f"{stem}.png": "a photo of <sound>",
        f"{stem}_2.png": "a sketch of <sound>",
    }
    assert all(facts["bundle"] == read_bundle(str(run_dir / "adapt" / "bundle")).sha for facts in made.values())


def test_everything_says_which_code_wrote_it(summary: dict[str, Any], run_dir: Path) -> None:
    for name in (
        "curated/curate.json", "features/manifest.json", "align/bundle/meta.json", "adapt/bundle/meta.json",
        "evaluate/evaluate.json", "promote/promote.json",
    ):  # fmt: skip
        assert re.fullmatch(CODE, json.loads((run_dir / name).read_text())["written_by"]), name
    for folder in ("curated/accepted", "curated/rejected", "features", "evaluate/pictures"):
        files = storage.list_files(str(run_dir / folder), ".parquet")
        assert [file for file in files if not re.fullmatch(CODE, storage.written_by(file))] == [], folder
    for file in (run_dir / "pictures").glob("*_seed*.png"):
        assert re.fullmatch(f"aai {CODE}", Image.open(file).info["Software"])
    painted = storage.read_table(str(run_dir / "evaluate" / "pictures"), ["png"])["png"][0].as_py()
    assert re.fullmatch(f"aai {CODE}", Image.open(io.BytesIO(painted)).info["Software"])


def test_status_tells_what_is_finished(summary: dict[str, Any], run_dir: Path) -> None:
    result = status.run(status.CONFIG.parse({"run_dir": str(run_dir)}))
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert stages.keys() == set(demo.STAGES)
    assert {stage["state"] for stage in stages.values()} == {"finished"}
    assert {stage["outdated"] for stage in stages.values()} == {""}
    assert stages["curate"]["rejects"] == summary["curate"]["by_code"]
    assert stages["promote"]["sha"] == stages["adapt"]["sha"] == read_bundle(str(run_dir / "adapt" / "bundle")).sha
    assert result["next"] == f"aai serve --set run_dir={run_dir}"


@pytest.mark.usefixtures("summary")
def test_a9_mistakes_end_in_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    header = tmp_path / "bad.csv"
    header.write_text("path,caption\nx.mp4,hello\n")
    (tmp_path / "nobundle").mkdir()
    for argv, named in [
        (["curate", "--set", "filters.min_duration=1"], "filters.min_duration"),
        (["curate", "--manifest", str(header), "--out", str(tmp_path / "c")], "uri"),
        (["generate", "--audio", str(tmp_path / "absent.wav")], "audio"),
        (["generate", "--audio", str(text), "--set", f"run_dir={run_dir}"], "audio"),
        (["generate", "--audio", str(empty), "--set", f"run_dir={run_dir}"], "audio"),
        (["evaluate", "--bundle", str(tmp_path / "nobundle")], "bundle"),
        (["generate", "--audio", str(text), "--bundle", str(tmp_path / "nobundle")], "bundle"),
    ]:
        capsys.readouterr()
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1, err
        assert named in err
        assert "Traceback" not in err
