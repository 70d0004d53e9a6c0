"""VGGSound's configs for real weights in a row, from its list to painted pictures, on this machine.

The weights are small, random, and of the same classes; the list is short. What is set here is what must differ on a
CPU: folders of models, workers, steps, numbers of clips and pictures. All else is what the files say.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aai import storage
from aai.adapt import AdaptLossConfig, prompt_of
from aai.bundle import read_bundle
from aai.features import FeatureManifest, load_split
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.inject import with_head
from pipelines.__main__ import CONFIGS, load_config, main
from tests.e2e.test_users_folder import words
from tests.tiny import write_ast, write_vitl14_sizes
from tests.vggsound import DEFECTS, LABELS, Listed, write_vggsound

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]

SPLITS = {"train": 20, "val": 4, "test": 12}
PICTURES = 4
WORKERS = ("cluster.num_workers=2", "cluster.cpus_per_worker=1", "cluster.gpus_per_worker=0")
FIT = (
    "fit.steps=4", "fit.batch_size=8", "fit.chunk_size=2", "fit.warmup_steps=1", "fit.eval_every=2",
    "fit.checkpoint_every=2",
)  # fmt: skip
PAINT = ("device=cpu", "request.steps=2")


def real(verb: str) -> list[str]:
    """The verb's config for VGGSound."""
    return ["--config", str(next((CONFIGS / verb).glob("vggsound_vitl14_*.yaml")))]


@dataclass(frozen=True)
class Place:
    """The bucket, what lies in it, and the models' folders."""

    bucket: Path
    foundation: FoundationSpec
    listed: list[Listed]

    @property
    def run(self) -> Path:
        """Where the configs put everything."""
        return self.bucket / "runs/vggsound_vitl14"

    def smaller(self, verb: str) -> list[str]:
        """What must differ from the verb's file."""
        conditions = [f"pictures.{name}={PICTURES}" for name in conditions_of_the_file()]
        return {
            "curate": words(self.foundation, *WORKERS),
            "featurize": words(self.foundation, *WORKERS, "batch_size=8"),
            "align": words(self.foundation, *WORKERS, *FIT, f"encoder.pretrained={self.bucket}/models/ast"),
            "adapt": words(None, *WORKERS, *FIT),
            "evaluate": words(None, *WORKERS, *PAINT, *conditions),
        }.get(verb, [])

    def result(self, name: str) -> dict[str, Any]:
        """A JSON file of the run."""
        return dict(storage.read_json(str(self.run / name)))


def conditions_of_the_file() -> list[str]:
    """The conditions of configs/evaluate's file."""
    return list(load_config("evaluate", real("evaluate"))[0].model_dump()["pictures"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    bucket = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AAI_BUCKET", str(bucket))
        patch.setenv("AAI_PICTURES", str(bucket / "pictures"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{bucket}/mlflow.db")
        val_share = load_config("curate", real("curate"))[0].model_dump()["val_share"]
        listed = write_vggsound(bucket / "data", **SPLITS, val_share=val_share)
        write_ast(bucket / "models/ast", frames=1024)
        yield Place(bucket, write_vitl14_sizes(bucket / "models"), listed)


def ran(place: Place, verb: str) -> Place:
    """The place after one more command."""
    assert main([verb, *real(verb), *place.smaller(verb)]) == 0
    return place


@pytest.fixture(scope="module")
def curated(place: Place) -> Place:
    return ran(place, "curate")


@pytest.fixture(scope="module")
def featurized(curated: Place) -> Place:
    return ran(curated, "featurize")


@pytest.fixture(scope="module")
def aligned(featurized: Place) -> Place:
    return ran(featurized, "align")


@pytest.fixture(scope="module")
def adapted(aligned: Place) -> Place:
    return ran(aligned, "adapt")


@pytest.fixture(scope="module")
def evaluated(adapted: Place) -> Place:
    return ran(adapted, "evaluate")


@pytest.fixture(scope="module")
def promotion(evaluated: Place) -> tuple[int, str, dict[str, Any]]:
    """Exit code, last words, and what promote.json holds."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["promote", *real("promote")])
    return code, said.getvalue(), evaluated.result("promote/promote.json")


def test_no_clip_is_lost_and_the_split_val_is_made(curated: Place) -> None:
    result, listed = curated.result("curated/curate.json"), curated.listed
    assert result["accepted"] + result["rejected"] == result["rows_in"] == len(listed)
    folder = str(curated.run / "curated")
    accepted, rejected = (storage.read_table(f"{folder}/{part}").to_pylist() for part in ("accepted", "rejected"))
    named = {storage.absolute(str(curated.bucket / "data" / row.uri)): row for row in listed}
    for row in accepted:
        clip = named[row["uri"]]
        assert clip.defect is None
        assert (row["caption"], row["labels"], row["split"]) == (clip.label, [clip.label], clip.kept_as)
        assert row["duration_s"] == pytest.approx(10, abs=0.2)
    rejects = {named[row["uri"]].defect: row["code"] for row in rejected}
    assert rejects == DEFECTS
    assert any("," in row["caption"] for row in accepted)


def test_how_val_came_about_is_told_and_kept(curated: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = [row.kept_as for row in curated.listed if row.split == "train"]
    why = f"{before.count('val')} of train's {len(before)} rows become the split val"
    assert why in curated.result("curated/curate.json")["chosen"]["val_share"]["why"]
    assert why in (curated.run / "curated/card.html").read_text().replace("&#39;", "'")
    assert main(["curate", *real("curate"), "--dry-run"]) == 0
    assert f"val_share      0.02 ({why}" in capsys.readouterr().out


def test_all_splits_have_features_of_what_the_prompt_says(featurized: Place) -> None:
    manifest = FeatureManifest.read(str(featurized.run / "features"))
    assert manifest.rows == SPLITS
    assert (manifest.dtype, manifest.image_dim, manifest.latent_shape) == ("float16", 768, (4, 64, 64))
    assert list(manifest.prompts) == ["a photo of {caption}"]
    test = load_split(str(featurized.run / "features"), "test", 16_000, ("text_features",))
    said = FrozenClip(featurized.foundation).texts([f"a photo of {caption}" for caption in test["caption"]])
    assert (test["text_features"][:, 0].float() * said).sum(-1).min() > 0.99


@pytest.mark.parametrize(
    ("verb", "steps", "batch"),
    [
        ("align", "5000 = 256000.0 epochs of 20 clips", "1,024 clips a step = 8 workers x 128, in chunks of 32"),
        ("adapt", "4000 = 25600.0 epochs of 20 clips", "128 clips a step = 8 workers x 16"),
    ],
)
def test_the_files_own_arithmetic_is_told(
    verb: str, steps: str, batch: str, aligned: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_machine = words(None, f"encoder.pretrained={aligned.bucket}/models/ast") if verb == "align" else []
    assert main([verb, *real(verb), *on_this_machine, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"steps          {steps}" in plan
    assert f"batch          {batch}" in plan
    assert re.search(r"memory +[\d.]+ GB a worker", plan)
    assert re.search(r"time +.* [\d.e-]+ s an epoch", plan)


def test_the_aligner_is_validated_on_val_and_is_an_ast(aligned: Place) -> None:
    bundle = read_bundle(str(aligned.run / "align/bundle"))
    assert bundle.config.encoder["backbone"] == "ast"
    assert bundle.config.encoder["clip_s"] == 10
    validated = [entry for entry in history(aligned, "align") if "val_a2v_r1" in entry]
    assert [entry["step"] for entry in validated] == [2, 4]
    for entry in validated:
        assert (entry["val_a2v_r1"] * SPLITS["val"]).is_integer()


def test_the_adapter_speaks_in_the_prompt_of_the_captions(adapted: Place) -> None:
    bundle = read_bundle(str(adapted.run / "adapt/bundle")).config
    assert bundle.prompt == "a photo of <sound>"
    assert bundle.adapter is not None
    assert bundle.adapter["num_tokens"] == 4
    loss = AdaptLossConfig(prompt=bundle.prompt, head_pattern=bundle.head_pattern)
    for label in LABELS.values():
        assert prompt_of(label, loss) == bundle.prompt
        assert with_head(label, bundle.head_pattern, bundle.prompt) == f"a photo of {label}"
    assert [entry["step"] for entry in history(adapted, "adapt") if "val_loss" in entry] == [2, 4]


def history(place: Place, stage: str) -> list[dict[str, float]]:
    """The entries of history.jsonl."""
    return [json.loads(line) for line in (place.run / stage / "history.jsonl").read_text().splitlines()]


def test_every_condition_has_its_figures(evaluated: Place) -> None:
    result, conditions = evaluated.result("evaluate/evaluate.json"), conditions_of_the_file()
    assert {"sound", "ceiling", "shuffled_audio", "random_token"} <= set(conditions)
    painted = result["generation"]
    assert painted["pictures"] == PICTURES * len(conditions)
    assert {name: painted[name]["pictures"] for name in conditions} == dict.fromkeys(conditions, PICTURES)
    assert set(painted["clip"]) == set(conditions)
    for name, figures in painted["clip"].items():
        assert set(figures) == {"aic", "ais", "iis", "clip_mmd"}, name
        assert all(math.isfinite(value) for value in figures.values()), name
    retrieval = result["retrieval"]
    assert (retrieval["gallery"], retrieval["overlap"]) == (SPLITS["test"], 0)
    assert all(math.isfinite(retrieval[way]["r10"]) for way in ("a2v", "v2a", "a2t", "t2a"))


def test_every_gate_is_judged_and_says_why(promotion: tuple[int, str, dict[str, Any]]) -> None:
    code, said, result = promotion
    gates = load_config("promote", real("promote"))[0].model_dump()["gates"]
    assert [verdict["gate"] for verdict in result["gates"]] == [gate["metric"] for gate in gates]
    assert [verdict["gate"] for verdict in result["gates"] if verdict["value"] is None] == []
    by_name = {verdict["gate"]: verdict for verdict in result["gates"]}
    assert by_name["retrieval.overlap"]["passed"]
    assert by_name["retrieval.batch_invariance_max_abs"]["passed"]
    failed = [verdict for verdict in result["gates"] if not verdict["passed"]]
    assert (code, result["passed"]) == ((2, False) if failed else (0, True))
    if failed:
        assert f"{failed[0]['gate']}={failed[0]['value']:.6g}: must be {failed[0]['bound']}" in said


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("verb", ["generate", "edit", "stylize"])
def test_pictures_are_painted_with_the_registered_bundle(verb: str, evaluated: Place) -> None:
    alias = evaluated.result("promote/promote.json")["alias"]  # candidate where a gate has failed
    sound = next(str(evaluated.bucket / "data" / row.uri) for row in evaluated.listed if row.kept_as == "test")
    picture = evaluated.bucket / "given.png"
    Image.new("RGB", (640, 480), (90, 140, 60)).save(picture)
    given = [] if verb == "generate" else ["--image", str(picture)]
    argv = ["--audio", sound, *given, "--bundle", f"models:/aai-vggsound@{alias}", *words(None, *PAINT)]
    assert main([verb, *real(verb), *argv]) == 0
    (painted,) = (evaluated.bucket / "pictures").glob(f"{verb}_*.png")
    image = Image.open(painted)
    assert image.size == (512, 512)
    assert json.loads(image.info["aai"])["bundle"] == read_bundle(str(evaluated.run / "adapt/bundle")).sha
