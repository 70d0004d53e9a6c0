"""Which weights a run stands on: found, pinned and hashed without loading any."""

from pathlib import Path

import pytest

from aai.errors import UserError
from aai.foundation.identity import TOY_WEIGHTS, WEIGHTS, FoundationSpec, identity, is_identity, locate


def write_weights(folder: Path, weights: bytes = b"w") -> FoundationSpec:
    """Two folders with one file of weights each."""
    for name in ("clip", "diffusion/unet"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(weights)
    return FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "diffusion"))


def test_where_models_are_found(tmp_path: Path) -> None:
    assert locate("toy:clip", None, "clip") == (str(TOY_WEIGHTS / "clip"), {"local_files_only": True})
    assert locate(str(tmp_path), "abc", "clip") == (str(tmp_path), {"local_files_only": True})
    assert locate("openai/clip", "abc", "clip") == ("openai/clip", {"revision": "abc"})


@pytest.mark.parametrize("model_id", ["/gone", "./gone", "gone", "a/b/c", "s3://bucket/clip", "toy:gone"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_asked_of_the_hub(model_id: str) -> None:
    with pytest.raises(UserError, match=r"^foundation\.diffusion=.*is neither a folder nor a hub id"):
        locate(model_id, "abc", "diffusion")


def test_a_hub_id_must_be_pinned() -> None:
    for revision in (None, ""):
        with pytest.raises(UserError, match=r"^foundation\.clip_revision=.*openai/clip is not pinned"):
            locate("openai/clip", revision, "clip")


def test_a_folder_is_pinned_by_its_files_and_their_names(tmp_path: Path) -> None:
    spec = write_weights(tmp_path / "a")
    first = identity(spec)
    assert (first["clip"], first["diffusion"]) == (spec.clip, spec.diffusion)
    (tmp_path / "a/clip/README.md").write_text("new words")
    assert identity(spec) == first
    moved = identity(write_weights(tmp_path / "b"))
    assert moved["clip_revision"] == first["clip_revision"]
    assert moved["clip_revision"] != moved["diffusion_revision"]  # the same bytes under another name
    other = identity(write_weights(tmp_path / "c", b"W"))
    assert {other[name] == first[name] for name in ("clip_revision", "diffusion_revision")} == {False}


def test_a_hub_id_is_pinned_by_its_revision(tmp_path: Path) -> None:
    spec = write_weights(tmp_path).model_copy(update={"clip": "openai/clip", "clip_revision": "abc"})
    assert (identity(spec)["clip"], identity(spec)["clip_revision"]) == ("openai/clip", "abc")


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/merges.txt", "model_index.json"])
def test_other_settings_and_tokenizers_are_another_foundation(tmp_path: Path, name: str) -> None:
    spec = write_weights(tmp_path)
    before = identity(spec, WEIGHTS)
    file = tmp_path / "diffusion" / name
    file.parent.mkdir(exist_ok=True)
    found = set()
    for text in ("{}", '{"beta_end": 0.5}', "absent"):
        if text == "absent":
            file.unlink()
        else:
            file.write_text(text)
        found.add(identity(spec)["diffusion_revision"])
        assert is_identity(spec, "diffusion_revision", before["diffusion_revision"]), "as an older release recorded it"
    assert len(found) == 3
    assert not is_identity(spec, "diffusion_revision", "another")
    assert not is_identity(spec, "unheard_of", "another")


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_weights(tmp_path)
    first = identity(spec)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", None)
        assert identity(spec) == first
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"longer")
    assert identity(spec) != first
