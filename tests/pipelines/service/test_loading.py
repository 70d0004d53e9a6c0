"""What a painter loads, and which bundles it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aai.bundle import read_bundle
from aai.errors import UserError
from aai.signatures import TrustConfig
from pipelines.service.loading import PainterConfig, first, loaded, try_out
from tests.e2e.test_rollover import another


def config(bundle: str, trust: TrustConfig | None = None, **model: Any) -> PainterConfig:
    told = {"name": "tiny", "version": "3", "sha": read_bundle(bundle).sha, "sample_rate_hz": 16_000, **model}
    given = {"bundle": bundle, "model": told, "registry": {}, "device": "cpu", "dtype": "float32", "stuck_s": 60}
    return PainterConfig.parse({**given, "addons": {}, "proof": {}, "trust": trust or {}})


def test_another_bundle_than_the_service_was_started_for_is_refused(tiny_bundle: str) -> None:
    with pytest.raises(UserError, match="the service was started for 0000; deploy again"):
        first(config(tiny_bundle, sha="0000"))
    with pytest.raises(UserError, match="the service runs with 8000; start the service again"):
        first(config(tiny_bundle, sample_rate_hz=8000))


def test_a_version_of_another_foundation_or_of_nobodys_signature_is_refused(tiny_bundle: str) -> None:
    c = config(tiny_bundle)
    strange = replace(first(c), foundation={"clip_revision": "another"})
    with pytest.raises(UserError, match="foundation="):
        loaded(c, tiny_bundle, c.model, strange)
    with pytest.raises(UserError, match="is not signed"):
        loaded(config(tiny_bundle, TrustConfig(public_keys=("nobody.pub",))), tiny_bundle, c.model)


def test_versions_share_their_foundation_with_the_frozen_clip(tiny_bundle: str, tmp_path: Path) -> None:
    c = config(tiny_bundle)
    ours = first(c)
    theirs = loaded(c, str(another(Path(tiny_bundle), tmp_path / "other")), c.model, ours)
    assert theirs.painter.pipe is ours.painter.pipe
    assert theirs.painter.concepts.clip is ours.painter.concepts.clip
    assert theirs.model.sha == read_bundle(tmp_path / "other").sha != ours.model.sha
    assert theirs.painter.adapter is not ours.painter.adapter


def test_pictures_of_one_colour_are_refused(tiny_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = first(config(tiny_bundle)).painter
    try_out(painter)
    vae = painter.pipe.vae
    whole = vae.decode
    monkeypatch.setattr(vae, "decode", lambda *args, **more: tuple(0 * part for part in whole(*args, **more)))
    with pytest.raises(UserError, match="are of one colour"):
        try_out(painter)
