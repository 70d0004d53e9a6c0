"""Signatures: whose bundle it is, and that nothing of it was changed since."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aai import storage
from aai.bundle import Bundle, read_bundle, sign_bundle, write_bundle
from aai.errors import UserError
from aai.signatures import (
    PASSWORD_VARIABLE,
    SIGNATURE,
    SigningConfig,
    TrustConfig,
    check,
    make_key,
    rehearse,
    sign,
    signer_of,
)
from tests.aai.test_bundle import ADAPTER, ALIGNER, META, make_config, reseal
from tests.certificates import PEM, certified, fingerprint


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "run" / "bundle", make_config(tmp_path / "f"), ALIGNER, ADAPTER, META)


@pytest.fixture
def signing(tmp_path: Path) -> SigningConfig:
    return SigningConfig(private_key=str(tmp_path / "keys" / "team.pem"), make_key=True)


def trust(*keys: str | None) -> TrustConfig:
    return TrustConfig(public_keys=tuple(f"{key}.pub" for key in keys))


def refusal(folder: Path, config: TrustConfig) -> str:
    """Why a bundle is not taken."""
    with pytest.raises(UserError) as error:
        check(folder, config, "the bundle")
    assert error.value.setting == "bundle"
    return error.value.rule


def test_signed_by_a_key_that_is_made(bundle: Bundle, signing: SigningConfig, tmp_path: Path) -> None:
    by = sign_bundle(str(bundle.folder), signing)
    private, public = tmp_path / "keys" / "team.pem", tmp_path / "keys" / "team.pem.pub"
    assert by == fingerprint(public)
    assert private.stat().st_mode & 0o077 == 0
    assert check(bundle.folder, trust(signing.private_key), "") == by
    assert read_bundle(bundle.folder).sha == bundle.sha  # a signature changes nothing of what a bundle is
    made = private.read_bytes()
    assert sign_bundle(str(bundle.folder), signing) == by
    assert private.read_bytes() == made  # a key that is there stays


def test_nothing_is_demanded_where_nobody_is_named(bundle: Bundle, signing: SigningConfig) -> None:
    assert check(bundle.folder, TrustConfig(), "") == ""
    sign(bundle.folder, signing)
    assert check(bundle.folder, TrustConfig(), "") == ""  # what nobody looked at is not told as known


def test_one_trusted_key_is_enough_and_another_is_refused(
    bundle: Bundle, signing: SigningConfig, tmp_path: Path
) -> None:
    sign(bundle.folder, signing)
    other = str(tmp_path / "other.pem")
    assert make_key(other)
    assert not make_key(other)
    assert "Key mismatch" in refusal(bundle.folder, trust(other))
    assert check(bundle.folder, trust(other, signing.private_key), "")
    with pytest.raises(UserError, match="no such file") as error:
        check(bundle.folder, trust(str(tmp_path / "none")), "")
    assert error.value.setting == "trust.public_keys"
    (tmp_path / "no.pub").write_text("no key")
    assert "PEM" in refusal(bundle.folder, trust(str(tmp_path / "no")))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap_weights(folder: Path) -> None:
    """As one would who can write there: other weights, and a seal that fits them."""
    flip(folder / "adapter.safetensors")
    (folder / SIGNATURE).rename(folder.parent / SIGNATURE)
    reseal(folder)
    (folder.parent / SIGNATURE).rename(folder / SIGNATURE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: flip(folder / "adapter.safetensors"), "adapter.safetensors changed since"),
        (lambda folder: flip(folder / "config.yaml"), "config.yaml changed since"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "meta.json changed since"),
        (swap_weights, "adapter.safetensors, meta.json changed since"),
        (lambda folder: (folder / "MLmodel").write_text("added"), "Extra files"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "Missing files"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "verificationMaterial"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b""), ""),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff\x00"), ""),
        (lambda folder: (folder / SIGNATURE).unlink(), "is not signed"),
    ],
)
def test_a_change_is_found(bundle: Bundle, signing: SigningConfig, change: Callable[[Path], object], told: str) -> None:
    sign(bundle.folder, signing)
    change(bundle.folder)
    assert told in refusal(bundle.folder, trust(signing.private_key))


def test_the_signature_of_another_bundle_is_none(bundle: Bundle, signing: SigningConfig, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", make_config(tmp_path / "f"), ADAPTER, ADAPTER, META)
    sign(other.folder, signing)
    (bundle.folder / SIGNATURE).write_bytes((other.folder / SIGNATURE).read_bytes())
    assert "aligner.safetensors" in refusal(bundle.folder, trust(signing.private_key))


def test_the_command_of_the_library_verifies_it(bundle: Bundle, signing: SigningConfig) -> None:
    sign(bundle.folder, signing)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(bundle.folder)]
    places = ["--signature", str(bundle.folder / SIGNATURE), "--public_key", f"{signing.private_key}.pub"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_signed_by_a_certificate(bundle: Bundle, tmp_path: Path) -> None:
    root = certified(tmp_path, "root")
    certified(tmp_path, "team", root)
    certified(tmp_path, "stranger")
    signing = SigningConfig(private_key=str(tmp_path / "team.pem"), certificate=str(tmp_path / "team.crt"))
    assert sign(bundle.folder, signing) == "certificate CN=team,O=Tests"
    trusted = TrustConfig(authorities=(str(tmp_path / "stranger.crt"), str(tmp_path / "root.crt")))
    assert check(bundle.folder, trusted, "") == "certificate CN=team,O=Tests"
    assert "certificate" in refusal(bundle.folder, TrustConfig(authorities=(str(tmp_path / "stranger.crt"),)))
    make_key(str(tmp_path / "key"))
    assert refusal(bundle.folder, trust(str(tmp_path / "key")))


def test_a_key_with_a_password(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "k.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked))
    signing = SigningConfig(private_key=str(tmp_path / "k.pem"))
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    for password in (None, "wrong"):
        if password:
            monkeypatch.setenv(PASSWORD_VARIABLE, password)
        with pytest.raises(UserError, match=PASSWORD_VARIABLE) as error:
            sign(bundle.folder, signing)
        assert error.value.setting == "signing.private_key"
        assert "secret" not in str(error.value)
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert sign(bundle.folder, signing).startswith("key ")


def test_what_cannot_sign_is_told_and_costs_no_signature(
    bundle: Bundle, signing: SigningConfig, tmp_path: Path
) -> None:
    sign(bundle.folder, signing)
    signed = (bundle.folder / SIGNATURE).read_bytes()
    (tmp_path / "no.pem").write_text("no key")
    for key, told in ((tmp_path / "no.pem", "cannot sign"), (tmp_path / "none.pem", "no such file")):
        with pytest.raises(UserError, match=told):
            rehearse(SigningConfig(private_key=str(key)))
        with pytest.raises(UserError, match=told):
            sign(bundle.folder, SigningConfig(private_key=str(key)))
    rehearse(SigningConfig())
    rehearse(signing)
    assert sorted(file.name for file in bundle.folder.iterdir())[-1] == SIGNATURE
    assert (bundle.folder / SIGNATURE).read_bytes() == signed


@pytest.mark.parametrize("given", [{"make_key": True}, {"certificate": "x"}, {"chain": ["x"]}])
def test_settings_that_do_nothing_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(UserError, match="private_key"):
        SigningConfig.parse(given)
    with pytest.raises(UserError, match="make_key"):
        SigningConfig.parse({"private_key": "x", "certificate": "x", "make_key": True})


def test_git_files_of_a_bundle_are_signed_too(bundle: Bundle, signing: SigningConfig) -> None:
    (bundle.folder / ".gitattributes").write_text("* text")
    sign(bundle.folder, signing)
    (bundle.folder / ".gitattributes").write_text("* -text")
    assert "changed since it was signed" in refusal(bundle.folder, trust(signing.private_key))


def test_a_key_that_another_command_makes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o022)
    try:
        assert make_key(f"{tmp_path}/team.pem")
        first = (tmp_path / "team.pem").read_bytes()
        monkeypatch.setattr(storage, "exists", lambda uri: False)
        assert not make_key(f"{tmp_path}/team.pem")
        assert os.umask(0o022) == 0o022, "what else this process writes is not its owner's alone"
    finally:
        os.umask(before)
    assert (tmp_path / "team.pem").read_bytes() == first


@pytest.mark.parametrize("material", [{"x509CertificateChain": {"certificates": []}}, None, {"publicKey": {}}])
def test_a_signature_in_ruins_is_of_nobody(material: object, tmp_path: Path) -> None:
    (tmp_path / SIGNATURE).write_text(json.dumps({"verificationMaterial": material}))
    assert signer_of(tmp_path) == "unknown"


def test_a_registered_version_is_signed_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a registered version is not changed"):
        check(tmp_path, trust("nobody"), "models:/toy/3")
