"""Pictures that prove their origin, and what becomes of the proof when somebody changes them."""

import io
import json
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from aai.errors import UserError
from aai.png import encode_png, same_picture
from aai.proof import CHUNK, HOW, MADE_BY_A_MODEL, ProofConfig, Prover, has_manifest, read_made, read_proof
from tests.certificates import certified

MADE = {"seed": 3, "bundle": "b" * 16, "sounds": {"sound": "0" * 64}, "eta": 0.5, "mask": None, "prompt": "ü <sound>"}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certified(folder, "painter", certified(folder, "root"))
    certified(folder, "forger", certified(folder, "cellar"))
    return folder


def prover_of(keys: Path, name: str = "painter") -> Prover:
    return Prover(ProofConfig(certificate=str(keys / f"{name}.chain"), private_key=str(keys / f"{name}.pem")))


@pytest.fixture(scope="module")
def prover(keys: Path) -> Prover:
    return prover_of(keys)


def chunks(png: bytes) -> list[bytes]:
    """The chunks of a PNG file, after its 8 bytes of signature."""
    out, at = [], 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        out.append(png[at : at + 12 + size])
        at += 12 + size
    return out


def manifest_of(png: bytes) -> bytes:
    return next(chunk for chunk in chunks(png) if chunk[4:8] == CHUNK)


def put(png: bytes, manifest: bytes) -> bytes:
    """A picture with a manifest from elsewhere."""
    head, *rest = [chunk for chunk in chunks(png) if chunk[4:8] != CHUNK]
    return png[:8] + b"".join([head, manifest, *rest])


def test_a_picture_proves_how_it_was_made(prover: Prover, keys: Path) -> None:
    png = prover.encode(picture(0), MADE)
    plain = encode_png(picture(0), MADE)
    proof = read_proof(png, str(keys / "root.crt"))
    assert (proof.state, proof.signer, proof.made, proof.reasons) == ("trusted", "Tests / painter", MADE, ())
    assert same_picture(png, plain)
    assert has_manifest(png)
    assert not has_manifest(plain)
    assert 0 < len(png) - len(plain) < 6000
    assert MADE_BY_A_MODEL.encode() in manifest_of(png)
    assert b"image/jpeg" not in manifest_of(png)  # no thumbnail


def test_without_authorities_it_is_valid_but_nobody_vouches(prover: Prover, keys: Path) -> None:
    png = prover.encode(picture(0), MADE)
    assert read_proof(png).state == "valid"
    forged = prover_of(keys, "forger").encode(picture(0), MADE)
    assert read_proof(forged, str(keys / "root.crt")).state == "valid"
    assert read_proof(forged, str(keys / "cellar.crt")).state == "trusted"


def test_what_is_changed_is_broken(prover: Prover, keys: Path) -> None:
    png, root = prover.encode(picture(0), MADE), str(keys / "root.crt")
    places = np.random.default_rng(1).integers(8, len(png), 60)
    for place in [*places.tolist(), len(png) - 1]:
        changed = bytearray(png)
        changed[place] ^= 1
        proof = read_proof(bytes(changed), root)
        assert proof.state in ("broken", "missing"), place
        assert proof.state == "broken" or CHUNK not in bytes(changed)  # the chunk's own name is gone
    assert read_proof(png + b"more", root).state == "broken"
    assert read_proof(png[: len(png) // 2], root).state == "broken"


def test_the_manifest_of_another_picture_or_text_is_broken(prover: Prover, keys: Path) -> None:
    root = str(keys / "root.crt")
    ours, other = prover.encode(picture(0), MADE), prover.encode(picture(1), MADE)
    assert put(ours, manifest_of(ours)) == ours
    proof = read_proof(put(other, manifest_of(ours)), root)
    assert (proof.state, proof.reasons) == ("broken", ("assertion.dataHash.mismatch",))
    lied = encode_png(picture(0), {**MADE, "bundle": "another"})
    assert read_proof(put(lied, manifest_of(ours)), root).state == "broken"


def test_a_stripped_manifest_is_missing(prover: Prover) -> None:
    png = prover.encode(picture(0), MADE)
    stripped = png[:8] + b"".join(chunk for chunk in chunks(png) if chunk[4:8] != CHUNK)
    proof = read_proof(stripped)
    assert (proof.state, proof.made, proof.signer) == ("missing", MADE, "")
    sink = io.BytesIO()
    Image.open(io.BytesIO(png)).save(sink, "PNG")  # as a picture editor would
    assert read_proof(sink.getvalue()).state == "missing"
    assert read_proof(sink.getvalue()).made == {}


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xe0 a JPEG"])
def test_what_is_no_png_is_told(data: bytes) -> None:
    with pytest.raises(UserError, match="is no PNG"):
        read_proof(data)


def test_certificates_that_cannot_sign_are_refused_before_anything_is_painted(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    wrong = {
        "self-signed": ("root.crt", "root.pem"),
        "is the key the certificate's": ("painter.chain", "forger.pem"),
        "no such file": ("none", "painter.pem"),
        "cannot sign": (str(tmp_path / "text"), "painter.pem"),
        "cannot sign pictures": ("painter.chain", str(tmp_path / "text")),
    }
    for told, (certificate, key) in wrong.items():
        with pytest.raises(UserError, match=told):
            Prover(ProofConfig(certificate=str(keys / certificate), private_key=str(keys / key)))
    with pytest.raises(UserError, match="belong together"):
        ProofConfig.parse({"certificate": "x"})
    with pytest.raises(UserError, match="no such file"):
        read_proof(encode_png(picture(0)), str(keys / "none"))


def test_a_picture_outlives_its_certificate(tmp_path: Path) -> None:
    """As docs/origins.md says: nothing tells when it was signed."""
    certified(tmp_path, "painter", certified(tmp_path, "root"), valid_s=2)
    png = prover_of(tmp_path).encode(picture(0), MADE)
    time.sleep(3)
    assert read_proof(png, str(tmp_path / "root.crt")).state == "trusted"


def test_what_others_wrote_moves_no_cursor(tmp_path: Path) -> None:
    certified(tmp_path, "x\n\x1b[2Jtrusted, signed by Our team", certified(tmp_path, "root"))
    (chain,), (key,) = (list(tmp_path.glob(f"x*.{end}")) for end in ("chain", "pem"))
    signer = read_proof(
        Prover(ProofConfig(certificate=str(chain), private_key=str(key))).encode(picture(0), MADE)
    ).signer
    assert signer == "Tests / x??[2Jtrusted, signed by Our team"


def test_without_a_certificate_it_is_the_plain_file() -> None:
    assert Prover(ProofConfig()).encode(picture(0), MADE) == encode_png(picture(0), MADE)


def test_goes_to_another_process(prover: Prover, keys: Path) -> None:
    again = pickle.loads(pickle.dumps(prover))
    assert read_proof(again.encode(picture(0), MADE), str(keys / "root.crt")).state == "trusted"


def test_painting_needs_no_c2pa() -> None:
    code = "import sys, aai.proof; aai.proof.Prover(aai.proof.ProofConfig()); sys.exit('c2pa' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_manifest_says_how_the_picture_was_made(prover: Prover) -> None:
    import c2pa

    with c2pa.Reader("image/png", io.BytesIO(prover.encode(picture(0), MADE))) as reader:
        assertions = (reader.get_active_manifest() or {})["assertions"]
    (how,) = [each["data"] for each in assertions if each["label"] == HOW]
    assert json.loads(how["json"]) == MADE


def test_without_a_manifest_damage_and_foreign_words_are_told_apart() -> None:
    plain = encode_png(picture(0), MADE)
    damaged = bytearray(plain)
    damaged[len(plain) // 2] ^= 0xFF
    for data in (bytes(damaged), plain[: len(plain) // 2]):
        broken = read_proof(data)
        assert (broken.state, dict(broken.made)) == ("broken", {})
        assert broken.reasons[0].startswith("the file is damaged")
    foreign = PngInfo()
    foreign.add_text("aai", "[1, 2]")
    sink = io.BytesIO()
    picture(0).save(sink, "PNG", pnginfo=foreign)
    assert (read_proof(sink.getvalue()).state, read_made(sink.getvalue())) == ("missing", {})
    head, *rest = chunks(plain)
    text = [chunk for chunk in rest if chunk[4:8] == b"tEXt"]
    others = [chunk for chunk in rest if chunk[4:8] not in (b"tEXt", b"IEND")]
    assert read_made(plain[:8] + b"".join([head, *others, *text, rest[-1]])) == MADE, "text behind the pixels"


@pytest.mark.parametrize("alone", ["certificate", "private_key"])
def test_a_certificate_and_its_key_belong_together(alone: str) -> None:
    with pytest.raises(UserError, match="belong together"):
        ProofConfig.parse({alone: "file.pem"})
