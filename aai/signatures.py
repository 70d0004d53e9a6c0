"""Signed bundles (OpenSSF model signing): who made a bundle, and that nothing of it was changed since.

`model.sig` in a bundle's folder is a signature over the SHA-256 of every other file, in the format of the
`model_signing` command, which verifies it too. Keys are elliptic (P-256, P-384, P-521), as PEM files.
"""

import base64
import contextlib
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from aai import storage
from aai.config import Config
from aai.errors import UserError, printable

log = logging.getLogger(__name__)

SIGNATURE = "model.sig"
PASSWORD_VARIABLE = "AAI_SIGNING_PASSWORD"
"""Environment variable with the password of an encrypted key; never a setting, so that no config or log can hold it."""


_MISMATCH = re.compile(r"Hash mismatch for \\?'([^'\\]+)")


class SigningConfig(Config):
    """With what a bundle is signed; without a key it is not."""

    private_key: str | None = None
    """PEM file of an elliptic key (P-256, P-384 or P-521); AAI_SIGNING_PASSWORD in the environment opens an encrypted
    one, which cannot have a certificate."""
    certificate: str | None = None
    """PEM file of the key's certificate: then who trusts its issuer trusts the bundle. It must be one for signing."""
    chain: tuple[str, ...] = ()
    """PEM files of the certificates between it and the issuer that others trust."""
    make_key: bool = False
    """Make private_key, and private_key.pub beside it, where there is none."""

    @pydantic.model_validator(mode="after")
    def _together(self) -> "SigningConfig":
        if self.private_key is None and (self.certificate or self.chain or self.make_key):
            raise ValueError("certificate, chain and make_key need a private_key")
        if self.certificate and self.make_key:
            raise ValueError("a certificate belongs to a key that is there: leave out make_key")
        return self


class TrustConfig(Config):
    """Whose bundles are taken; where nothing is named, all are."""

    public_keys: tuple[str, ...] = ()
    """PEM files; a bundle must be signed by one of these keys, or by a certificate of one of the authorities."""
    authorities: tuple[str, ...] = ()
    """PEM files of certificates; whoever has a certificate for signing from one of them may sign."""

    def anywhere(self) -> "TrustConfig":
        """The same as it holds in any folder of this machine."""
        keys, above = ([storage.absolute(uri) for uri in uris] for uris in (self.public_keys, self.authorities))
        return TrustConfig(public_keys=tuple(keys), authorities=tuple(above))

    @property
    def demands(self) -> bool:
        """Whether a bundle must be signed."""
        return bool(self.public_keys or self.authorities)


def make_key(uri: str) -> bool:
    """Makes a P-256 key at `uri` (a local one only the owner can read) and `uri`.pub; False where there is one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if storage.exists(uri):
        return False
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    before = os.umask(0o077)  # nobody else reads the key, not for a moment
    try:
        storage.write_bytes(uri, private, new=True)
    except FileExistsError:  # another command made one meanwhile
        return False
    finally:
        os.umask(before)
    storage.write_bytes(uri + ".pub", public)
    log.info("signing: a new key %s; who checks bundles needs %s.pub", uri, uri)
    return True


def sign(folder: Path, config: SigningConfig) -> str:
    """Writes model.sig into a local bundle folder; returns who signed, as `check` does. Raises UserError."""
    if config.private_key is None:
        raise UserError("signing.private_key", "(missing)", "there is nothing to sign with", "name a PEM file")
    if config.make_key:
        make_key(config.private_key)
    fresh = folder.parent / f".{uuid.uuid4().hex}.sig"  # not within: the bundle is readable meanwhile
    with _local("signing.private_key", config.private_key) as key, contextlib.ExitStack() as stack:
        certificates = []
        for uri in (config.certificate, *config.chain):
            if uri is not None:
                certificates.append(stack.enter_context(_local("signing.certificate", uri)))
        try:
            _signer(key, certificates).set_hashing_config(_hashing(folder)).sign(folder, fresh)
        except (ValueError, TypeError, OSError) as error:  # no key, a wrong password, a certificate of another key
            remedy = f"give an elliptic key in PEM, and its password in {PASSWORD_VARIABLE}"
            raise UserError("signing.private_key", config.private_key, f"cannot sign ({error})", remedy) from error
    fresh.replace(folder / SIGNATURE)  # what was signed before stays until this is done
    return signer_of(folder)


def _signer(key: Path, certificates: list[Path]) -> Any:
    """The library's signer by a key, or by a key with its certificate and the chain above it."""
    from model_signing import signing

    if not certificates:
        password: Any = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
        return signing.Config().use_elliptic_key_signer(private_key=key, password=password)
    chain = certificates[1:] or certificates  # the library fails where the chain is empty
    return signing.Config().use_certificate_signer(
        private_key=key, signing_certificate=certificates[0], certificate_chain=chain
    )


def rehearse(config: SigningConfig) -> str:
    """Who would sign with these settings, "" without a key. Raises UserError when nothing could be signed.

    For before hours of training, and not after.
    """
    if not config.private_key:
        return ""
    with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        (folder / "file").touch()
        return sign(folder, config)


def check(folder: Path, trust: TrustConfig, bundle: object) -> str:
    """Who signed a bundle; "" where `trust` names nobody, and so nothing is looked at.

    Raises UserError for a bundle that is not signed, was changed since, or was signed by somebody else, where `trust`
    names somebody. A certificate counts as of the day that it became valid: a bundle outlives it.
    """
    if not trust.demands:
        return ""
    if not (folder / SIGNATURE).is_file():
        rule = f"is not signed: it has no {SIGNATURE}, and only signed bundles are taken"
        remedy = "sign it with `aai sign`, by a key that is trusted"
        if str(bundle).startswith("models:"):
            remedy = "sign that bundle's folder with `aai sign` and promote it: a registered version is not changed"
        raise UserError("bundle", bundle, rule, remedy)
    reasons = []
    for setting, uris in (("public_keys", trust.public_keys), ("authorities", trust.authorities)):
        for uri in uris:
            with _local(f"trust.{setting}", uri) as file:
                reason = _refusal(folder, file, setting == "authorities")
            if reason is None:
                return signer_of(folder)
            reasons.append(f"{uri}: {reason}")
    rule = f"its signature is not one that is trusted ({'; '.join(reasons)})"
    raise UserError("bundle", bundle, rule, "fetch the bundle as it was signed, or name its signer in `trust`")


def signer_of(folder: Path) -> str:
    """Who says to have signed: `key` and the start of the public key's SHA-256, or `certificate` and its subject."""
    from cryptography import x509

    try:
        material = json.loads((folder / SIGNATURE).read_bytes())["verificationMaterial"]
        if "publicKey" in material:
            return f"key {printable(material['publicKey']['hint'][:16])}"
        first = base64.b64decode(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
        return f"certificate {printable(x509.load_der_x509_certificate(first).subject.rfc4514_string())}"
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"


def _refusal(folder: Path, trusted: Path, is_authority: bool) -> str | None:
    """Why a signature is not of this key or authority, or not of these files; None when it is."""
    from model_signing import verifying

    try:
        config = verifying.Config().set_hashing_config(_hashing(folder))
        if is_authority:
            config.use_certificate_verifier(certificate_chain=[trusted])
        else:
            config.use_elliptic_key_verifier(public_key=trusted)
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises many kinds, of three packages: whatever it says, it is no yes
        if changed := _MISMATCH.findall(str(error)):
            return f"{', '.join(map(printable, changed))} changed since it was signed"
        return printable(str(error).strip().split("\n")[0]) or type(error).__name__
    return None


def _hashing(folder: Path) -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)


@contextlib.contextmanager
def _local(setting: str, uri: str) -> Iterator[Path]:
    """The file on this machine. Raises UserError when it is not there."""
    if not storage.exists(uri):
        raise UserError(setting, uri, "no such file", "give a PEM file; `aai sign --help` tells how to make a key")
    if not uri.startswith("s3://"):
        yield Path(storage.absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
        file = Path(scratch) / "key.pem"
        file.write_bytes(storage.read_bytes(uri))
        yield file
