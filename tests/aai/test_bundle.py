"""The bundle: what is written is what is read, and nothing else is ever opened."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from aai import storage
from aai.bundle import Bundle, BundleConfig, read_bundle, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.version import code_version

ALIGNER = {"head.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)}
ADAPTER = {"net.weight": torch.linspace(-1, 1, 8, dtype=torch.float16).reshape(2, 4)}
META = {"data_fingerprint": "d1", "metrics": {"r1": 0.5}, "parents": ["p1"]}


def make_config(root: Path, adapter: bool = True) -> BundleConfig:
    """A config whose foundation is two small folders of weights."""
    for name in ("clip", "sd"):
        (root / name).mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.full((2,), float(len(name)))}, root / name / "model.safetensors")
    return BundleConfig(
        foundation=FoundationSpec(clip=str(root / "clip"), diffusion=str(root / "sd")),
        encoder={"backbone": "ast", "dims": (32, 64)},
        adapter={"tokens": 1} if adapter else None,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "run" / "bundle", make_config(tmp_path / "f"), ALIGNER, ADAPTER, META)


def reseal(folder: Path, **changes: object) -> None:
    """Rewrites meta.json with true hashes of what lies there now, plus changes."""
    meta = json.loads((folder / "meta.json").read_text())
    names = [file.name for file in folder.iterdir() if file.name != "meta.json"]
    meta["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def refusal(uri: str | Path) -> str:
    """The one line with which a bundle is refused."""
    with pytest.raises(UserError) as error:
        read_bundle(uri)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(bundle: Bundle) -> None:
    found = read_bundle(bundle.folder)
    assert sorted(os.listdir(found.folder)) == [
        "adapter.safetensors",
        "aligner.safetensors",
        "config.yaml",
        "meta.json",
    ]
    assert found.config == read_bundle(str(bundle.folder)).config
    assert found.config.encoder == {"backbone": "ast", "dims": [32, 64]}
    assert found.config.neutral_word == "thing"
    for given, read in ((ALIGNER, found.aligner()), (ADAPTER, found.adapter())):
        assert given.keys() == read.keys()
        assert all(torch.equal(given[k], read[k]) and given[k].dtype == read[k].dtype for k in given)
    assert {k: found.meta[k] for k in META} == META
    assert found.meta["version"] == 1
    assert found.meta["created_at"].endswith("+00:00")
    assert found.meta["written_by"] == code_version()
    assert found.meta["foundation"].keys() == {"clip", "clip_revision", "diffusion", "diffusion_revision"}


def test_aligned_only(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", make_config(tmp_path / "f", adapter=False), ALIGNER, None, {})
    assert not (made.folder / "adapter.safetensors").exists()
    with pytest.raises(UserError, match="only aligned"):
        made.adapter()
    with pytest.raises(UserError, match="come together"):
        write_bundle(tmp_path / "b", make_config(tmp_path / "f", adapter=False), ALIGNER, ADAPTER, {})


def test_tied_and_strided_weights(tmp_path: Path) -> None:
    w = torch.arange(12.0).reshape(3, 4).requires_grad_()
    config = make_config(tmp_path / "f", adapter=False)
    made = write_bundle(tmp_path / "b", config, {"a": w, "b": w, "c": w.T}, None, {})
    assert torch.equal(made.aligner()["c"], w.detach().T)


def test_sha_follows_content_only(tmp_path: Path, bundle: Bundle) -> None:
    config = make_config(tmp_path / "f")
    again = write_bundle(tmp_path / "copy", config, ALIGNER, ADAPTER, {**META, "metrics": {"r1": 0.9}})
    assert again.sha == bundle.sha
    other = {**ADAPTER, "net.weight": ADAPTER["net.weight"] + 1}
    assert write_bundle(tmp_path / "copy", config, ALIGNER, other, META).sha != bundle.sha
    newer = {"data_fingerprint": "d2"}
    assert write_bundle(tmp_path / "copy", config, ALIGNER, ADAPTER, newer).sha != bundle.sha


def test_another_commit_makes_no_other_bundle(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aai.bundle.code_version", lambda: "9.9 (commit fffffff)")
    again = write_bundle(tmp_path / "copy", make_config(tmp_path / "f"), ALIGNER, ADAPTER, META)
    assert again.meta["written_by"] != bundle.meta["written_by"]
    assert again.sha == bundle.sha


def test_a_bundle_of_before_is_still_read(bundle: Bundle) -> None:
    meta = json.loads((bundle.folder / "meta.json").read_text())
    del meta["written_by"]
    (bundle.folder / "meta.json").write_text(json.dumps(meta))
    assert read_bundle(bundle.folder).sha == bundle.sha


def test_replaces_an_older_bundle_whole(tmp_path: Path, bundle: Bundle) -> None:
    config = make_config(tmp_path / "f", adapter=False)
    write_bundle(bundle.folder, config, {"x": torch.ones(1)}, None, {})
    assert read_bundle(bundle.folder).aligner().keys() == {"x"}
    assert os.listdir(bundle.folder.parent) == ["bundle"]


def test_failed_write_keeps_the_older_bundle(tmp_path: Path, bundle: Bundle) -> None:
    broken = {"head.weight": torch.tensor([float("nan")])}
    with pytest.raises(UserError, match=r"head\.weight: holds NaN"):
        write_bundle(bundle.folder, make_config(tmp_path / "f"), broken, ADAPTER, {})
    assert read_bundle(bundle.folder).sha == bundle.sha
    assert os.listdir(bundle.folder.parent) == ["bundle"]


def test_never_replaces_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt: it is not a bundle"):
        write_bundle(tmp_path / "home", make_config(tmp_path / "f"), ALIGNER, ADAPTER, {})
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "sub/x.PT", "last.ckpt", "w.pth"])
def test_refuses_pickles_anywhere(bundle: Bundle, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {ran}",)

    (bundle.folder / "sub").mkdir()
    (bundle.folder / name).write_bytes(pickle.dumps(Evil()))
    assert f"{name} may hold a pickle" in refusal(bundle.folder)
    assert not ran.exists()


def test_refuses_unknown_files_but_not_those_of_mlflow(bundle: Bundle) -> None:
    (bundle.folder / "MLmodel").write_text("flavors: {}")
    assert read_bundle(bundle.folder).sha == bundle.sha
    (bundle.folder / "setup.py").write_text("import os")
    assert "setup.py does not belong" in refusal(bundle.folder)


@pytest.mark.parametrize("name", ["config.yaml", "aligner.safetensors", "adapter.safetensors", "meta.json"])
def test_missing_file(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).unlink()
    assert f"{name} is missing" in refusal(bundle.folder)


@pytest.mark.parametrize("name", ["config.yaml", "aligner.safetensors", "adapter.safetensors"])
def test_one_changed_byte(bundle: Bundle, name: str) -> None:
    data = bytearray((bundle.folder / name).read_bytes())
    data[-1] ^= 1
    (bundle.folder / name).write_bytes(bytes(data))
    assert f"{name} has SHA-256" in refusal(bundle.folder)


def test_no_such_bundle(tmp_path: Path) -> None:
    assert "no such bundle" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "no such bundle" in refusal(tmp_path / "file")
    assert "is not allowed" in refusal("https://example.com/bundle")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"version": 2}', "has version 2, this code reads version 1"),
        ('{"version": 1, "created_at": "x", "files": []}', "lacks 'files'"),
    ],
)
def test_broken_meta(bundle: Bundle, text: str, rule: str) -> None:
    (bundle.folder / "meta.json").write_text(text)
    assert rule in refusal(bundle.folder)


def test_config_of_a_stranger_reads_no_environment(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_TEST_SECRET", "secret")
    settings = yaml.safe_load((bundle.folder / "config.yaml").read_text())
    settings["neutral_word"] = "${oc.env:AAI_TEST_SECRET}"
    (bundle.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    reseal(bundle.folder)
    assert read_bundle(bundle.folder).config.neutral_word == "${oc.env:AAI_TEST_SECRET}"


def test_config_errors_name_the_key(bundle: Bundle) -> None:
    settings = yaml.safe_load((bundle.folder / "config.yaml").read_text())
    (bundle.folder / "config.yaml").write_text(yaml.safe_dump({**settings, "neutral_wrd": "x"}))
    reseal(bundle.folder)
    assert "did you mean 'neutral_word'?" in refusal(bundle.folder)
    (bundle.folder / "config.yaml").write_text("a: [")
    reseal(bundle.folder)
    assert "config.yaml is not YAML" in refusal(bundle.folder)


def test_other_weights_under_the_same_name(tmp_path: Path, bundle: Bundle) -> None:
    bundle.verify_foundation()
    save_file({"w": torch.zeros(2)}, tmp_path / "f" / "sd" / "model.safetensors")
    with pytest.raises(UserError, match=r"foundation\.diffusion_revision=.* was trained on"):
        bundle.verify_foundation()


def test_s3_round_trip_and_replacement(tmp_path: Path, s3: str) -> None:
    made = write_bundle(f"{s3}/bundle", make_config(tmp_path / "f"), ALIGNER, ADAPTER, META)
    found = read_bundle(f"{s3}/bundle")
    assert found.sha == made.sha
    assert torch.equal(found.adapter()["net.weight"], ADAPTER["net.weight"])
    write_bundle(f"{s3}/bundle/", make_config(tmp_path / "f", adapter=False), ALIGNER, None, META)
    assert read_bundle(f"{s3}/bundle").config.adapter is None
    storage.write_bytes(f"{s3}/bundle/x.pkl", b"1")
    assert "may hold a pickle" in refusal(f"{s3}/bundle")
    assert "no such bundle" in refusal(f"{s3}/absent")
