"""Pictures that prove their origin: a C2PA manifest in the PNG, signed, which says that a model made it, and how.

C2PA 2 (claims, assertions, IPTC's digital source type `trainedAlgorithmicMedia`), by the library c2pa-python. Nothing
is fetched from the network, neither to sign nor to check.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pydantic
from PIL import Image

from aai import storage
from aai.config import Config
from aai.errors import UserError, printable
from aai.png import MADE, encode_png
from aai.version import code_version

MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
HOW = "org.aai.made"
"""Label of the assertion that says how, as the PNG text `aai` does."""
CHUNK = b"caBX"
"""The PNG chunk that holds a manifest."""
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}
State = Literal["trusted", "valid", "broken", "missing"]


class ProofConfig(Config):
    """With what pictures are signed; without a certificate they carry no manifest."""

    certificate: str | None = None
    """PEM file of the certificate, and after it those up to the authority's; C2PA wants one for signing (extended key
    usage emailProtection or documentSigning), issued by another."""
    private_key: str | None = None
    """PEM file of its elliptic key (P-256), without a password."""

    @pydantic.model_validator(mode="after")
    def _together(self) -> "ProofConfig":
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("certificate and private_key belong together: give both or none")
        return self

    def anywhere(self) -> "ProofConfig":
        """The same as it holds in any folder of this machine."""
        places = {name: uri and storage.absolute(uri) for name, uri in self.model_dump().items()}
        return self.model_copy(update=places)


@dataclass(frozen=True)
class Proof:
    """What a picture proves."""

    state: State
    """trusted: unchanged, and signed by one whom the given authorities vouch for. valid: unchanged since somebody
    signed it. broken: changed, or another's manifest. missing: no manifest."""
    signer: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: the PNG text `aai`, which the signature covers. Without one anybody can have written it."""
    reasons: tuple[str, ...] = ()
    """What is wrong, by C2PA's codes."""


class Prover:
    """Signs pictures, about 2 ms each. Raises UserError for a certificate or key that C2PA does not take."""

    def __init__(self, config: ProofConfig) -> None:
        self.config = config
        if config.certificate:
            self._rehearse()

    def _rehearse(self) -> None:
        """Signs a picture and reads it back, before hours of painting and not after."""
        import c2pa

        try:
            proof = read_proof(self.sign(encode_png(Image.new("RGB", (1, 1))), {}))
            reason = f"{', '.join(proof.reasons)}: is the key the certificate's?" if proof.state == "broken" else ""
        except c2pa.C2paError as error:
            reason = printable(error).strip()
        if reason:
            remedy = "give a certificate chain and its P-256 key, see docs/origins.md"
            raise UserError("proof.certificate", self.config.certificate, f"cannot sign pictures ({reason})", remedy)

    def __getstate__(self) -> dict[str, Any]:
        """Only the settings go to another process."""
        return {"config": self.config}

    @cached_property
    def _context(self) -> Any:
        import c2pa

        chain = _read("proof.certificate", self.config.certificate)
        key = _read("proof.private_key", self.config.private_key)
        settings = {"verify": {**OFFLINE, "verify_after_sign": False}, "builder": {"thumbnail": {"enabled": False}}}
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain, key, None))
        return c2pa.Context(settings=c2pa.Settings.from_dict({"version": 1, **settings}), signer=signer)

    def encode(self, image: Image.Image, made: Mapping[str, Any]) -> bytes:
        """The PNG file of a painted picture: `made` as its text, and signed where there is a certificate."""
        png = encode_png(image, made)
        return self.sign(png, made) if self.config.certificate else png

    def sign(self, png: bytes, made: Mapping[str, Any]) -> bytes:
        """The same PNG file with a manifest."""
        import c2pa

        created = {"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL}
        manifest = {
            "claim_generator_info": [{"name": "aai", "version": code_version()}],
            "format": "image/png",
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": HOW, "data": {"json": json.dumps(made)}},  # as text: C2PA takes lists of numbers for bytes
            ],
        }
        sink = io.BytesIO()
        c2pa.Builder(manifest, context=self._context).sign("image/png", io.BytesIO(png), sink)
        return sink.getvalue()


def read_made(png: bytes) -> dict[str, Any]:
    """What a PNG file says of its making, which anybody can have written. Raises UserError for no PNG."""
    return _text(png)[0]


def has_manifest(png: bytes) -> bool:
    """Whether a PNG file carries one, true or not."""
    return CHUNK in png


def read_proof(png: bytes, authorities: str | None = None) -> Proof:
    """What a PNG file proves. authorities: PEM file of those who vouch for signers.

    Raises UserError for a file that is no PNG, and for authorities that cannot be read. A damaged file is broken.
    """
    import c2pa

    told, damage = _text(png)
    settings: dict[str, Any] = {"version": 1, "verify": {**OFFLINE, "verify_trust": True}}
    if authorities:
        settings["trust"] = {"trust_anchors": _read("authorities", authorities).decode(errors="replace")}
    try:
        context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
    except c2pa.C2paError as error:
        raise UserError("authorities", authorities, f"cannot be read ({error})", "give a PEM file") from error
    try:
        with c2pa.Reader("image/png", io.BytesIO(png), context=context) as reader:
            state, manifest = reader.get_validation_state(), reader.get_active_manifest() or {}
            results = (reader.get_validation_results() or {}).get("activeManifest", {})
    except c2pa.C2paError.ManifestNotFound:
        return Proof("broken" if damage else "missing", made=told, reasons=damage)
    except (c2pa.C2paError, KeyError, ValueError) as error:  # the last two: a manifest store in ruins
        return Proof("broken", made=told, reasons=(*damage, printable(error)))
    signature = manifest.get("signature_info", {})
    signer = " / ".join(printable(signature[name]) for name in ("issuer", "common_name") if signature.get(name))
    failures = tuple(failure["code"] for failure in results.get("failure", []))
    if damage or state not in ("Trusted", "Valid"):
        return Proof("broken", signer, told, (*failures, *damage))
    return Proof("trusted" if state == "Trusted" else "valid", signer, told, failures)


def _text(png: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The PNG text `aai`, and what is damaged. Raises UserError for a file that is no PNG."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError("picture", f"{len(png)} bytes", "is no PNG file", "give the file as it was painted")
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            image.load()  # text may stand behind the pixels
            told = json.loads(image.info.get(MADE, "{}"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return {}, (f"the file is damaged ({printable(error)})",)
    return (told if isinstance(told, dict) else {}), ()


def _read(setting: str, uri: str | None) -> bytes:
    if not uri or not storage.exists(uri):
        raise UserError(setting, uri, "no such file", "give a PEM file")
    return storage.read_bytes(uri)
