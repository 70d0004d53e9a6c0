"""`aai sign`, and that adapt, promote and serve make and demand signatures."""

import logging
import shutil
from pathlib import Path

import pytest

from aai.bundle import sign_bundle
from aai.errors import UserError
from aai.signatures import SIGNATURE, SigningConfig, TrustConfig
from pipelines.__main__ import main
from pipelines.registry import versions
from pipelines.serve import ServeConfig, pin
from tests.certificates import fingerprint
from tests.pipelines.registry.test_versions import make_bundle
from tests.pipelines.test_serve import write_tiny_bundle
from tests.pipelines.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:
    return Workshop(tmp_path, empty_store)


def test_signs_as_a_user_would(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(tmp_path, 1)
    words = ["sign", "--bundle", f"{tmp_path}/bundle", "--key", f"{tmp_path}/k.pem"]
    assert main([*words, "--dry-run"]) == 0
    assert f"{tmp_path}/bundle/{SIGNATURE}" in capsys.readouterr().out
    assert main(words) == 2
    assert "no such file" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert main([*words, "--new-key"]) == 0
    assert fingerprint(tmp_path / "k.pem.pub") in caplog.text
    assert (tmp_path / "bundle" / SIGNATURE).exists()
    assert main(["sign", "--bundle", "models:/aai/1", "--key", f"{tmp_path}/k.pem"]) == 2
    assert "registered version" in capsys.readouterr().err


def test_promotes_what_is_signed_and_says_by_whom(shop: Workshop) -> None:
    shop.bundle(1)
    assert shop.promote(1)["version"] == 1
    by = fingerprint(shop.folder / "keys" / "signing.pem.pub")
    assert versions.version_tags(shop.cfg, 1)["signed_by"] == by


def test_refuses_the_unsigned_and_the_strangers(shop: Workshop) -> None:
    shop.bundle(1)
    shop.promote(1)
    shop.bundle(2)
    signature = shop.folder / "2" / "bundle" / SIGNATURE
    signature.unlink()
    with pytest.raises(UserError, match="is not signed"):
        shop.promote(2)
    shop.sign(2, "keys/stranger.pem")
    with pytest.raises(UserError, match="not one that is trusted"):
        shop.promote(2)
    with pytest.raises(UserError, match="not one that is trusted"):
        shop.promote(2, force=True, reason="no gate stands above a signature")
    assert shop.aliases() == {"champion": 1, "candidate": 1}
    assert [version.version for version in versions.listing(shop.cfg)] == [1]
    shop.sign(2)
    assert shop.promote(2)["champion"] == 2


def test_a_version_registered_unsigned_is_registered_anew(shop: Workshop) -> None:
    bundle = shop.bundle(1)
    signature = bundle.folder / SIGNATURE
    kept = signature.read_bytes()
    signature.unlink()
    versions.register(shop.cfg, bundle.folder, {}, {})
    signature.write_bytes(kept)
    assert shop.promote(1)["version"] == 2
    assert shop.aliases()["champion"] == 2


def test_a_rollback_brings_back_nothing_that_is_not_trusted(shop: Workshop) -> None:
    for seed in (1, 2):
        shop.bundle(seed)
        shop.promote(seed)
    shop.sign(1, "keys/stranger.pem")
    stranger = {"public_keys": [str(shop.folder / "keys" / "stranger.pem.pub")]}
    with pytest.raises(UserError, match="not one that is trusted"):
        shop.promote(1, rollback=True, trust=stranger)
    assert shop.aliases()["champion"] == 2
    shop.promote(1, rollback=True)
    assert shop.aliases()["champion"] == 1


def test_serve_refuses_what_promote_would(shop: Workshop, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    shutil.copytree(bundle, tmp_path / "signed")
    sign_bundle(str(tmp_path / "signed"), SigningConfig(private_key=str(tmp_path / "k.pem"), make_key=True))
    trust = TrustConfig(public_keys=(f"{tmp_path}/k.pem.pub",))
    pin(ServeConfig(bundle=str(tmp_path / "signed"), trust=trust))
    pin(ServeConfig(bundle=str(bundle)))
    with pytest.raises(UserError, match="is not signed"):
        pin(ServeConfig(bundle=str(bundle), trust=trust))
    number = versions.register(shop.cfg, bundle, {}, {})
    tracking = shop.cfg.model_dump(include={"uri"})
    uri = f"models:/{shop.cfg.model_name}/{number}"
    with pytest.raises(UserError, match="is not signed"):
        pin(ServeConfig.parse({"bundle": uri, "trust": trust.model_dump(), "tracking": tracking}))
