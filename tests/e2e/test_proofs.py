"""Proofs under attack (make accept): 100 pictures, every byte of one flipped, 50 tampered or unsigned bundles.

Pictures of 512 px of noise, which compress as little as any; times are of one core.
"""

import itertools
import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aai.bundle import sign_bundle
from aai.errors import UserError
from aai.png import encode_png
from aai.proof import CHUNK, Proof, Prover, read_proof
from aai.signatures import SIGNATURE, SigningConfig, TrustConfig
from pipelines.registry import versions
from pipelines.serve import ServeConfig, pin
from tests.aai.test_proof import MADE, chunks, manifest_of, prover_of, put
from tests.aai.test_signatures import flip
from tests.certificates import certified
from tests.pipelines.conftest import empty_store  # noqa: F401
from tests.pipelines.test_serve import write_tiny_bundle
from tests.pipelines.workshop import Workshop

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certified(folder, "painter", certified(folder, "root"))
    return folder


@pytest.fixture(scope="module")
def prover(keys: Path) -> Prover:
    return prover_of(keys)


def test_m6_hundred_pictures(prover: Prover, keys: Path) -> None:
    root = str(keys / "root.crt")
    rng, sign_ms, sizes, seen = np.random.default_rng(0), [], [], Counter[str]()
    signed = []
    for number in range(100):
        made = {**MADE, "seed": number}
        plain = encode_png(Image.fromarray(rng.integers(0, 255, (512, 512, 3), np.uint8)), made)
        start = time.perf_counter()
        signed.append(prover.sign(plain, made))
        sign_ms.append(1000 * (time.perf_counter() - start))
        sizes.append(len(signed[-1]) - len(plain))
    for number, png in enumerate(signed):
        proof = read_proof(png, root)
        assert proof.made["seed"] == number
        seen[f"as painted: {proof.state}"] += 1
        changed = bytearray(png)
        changed[int(rng.integers(8, len(png)))] ^= 1 << int(rng.integers(8))
        seen[f"a bit flipped: {told(read_proof(bytes(changed), root))}"] += 1
        other = put(signed[(number + 1) % 100], manifest_of(png))
        seen[f"another's manifest: {told(read_proof(other, root))}"] += 1
        stripped = png[:8] + b"".join(chunk for chunk in chunks(png) if chunk[4:8] != CHUNK)
        seen[f"stripped: {told(read_proof(stripped, root))}"] += 1
    print(dict(seen), f"{statistics.median(sign_ms):.2f} ms, most {max(sign_ms):.2f} ms, {max(sizes)} bytes a picture")
    assert seen == {
        "as painted: trusted": 100, "a bit flipped: broken": 100, "another's manifest: broken": 100,
        "stripped: missing": 100,
    }  # fmt: skip
    assert max(sizes) <= 6000


def told(proof: Proof) -> str:
    """Its state; every one that is broken says why."""
    assert proof.state != "broken" or proof.reasons
    return proof.state


def test_m6_every_bit_of_a_picture(prover: Prover, keys: Path) -> None:
    png = prover.encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)), MADE)
    seen = Counter[str]()
    for place, bit in itertools.product(range(8, len(png)), range(8)):
        changed = bytearray(png)
        changed[place] ^= 1 << bit
        seen[read_proof(bytes(changed), str(keys / "root.crt")).state] += 1
    print(f"{len(png) - 8} bytes, each bit flipped: {dict(seen)}")
    assert seen["trusted"] == seen["valid"] == 0


def test_m6_fifty_bundles(tmp_path: Path, empty_store: Path) -> None:  # noqa: F811
    """Each way to tamper with a bundle, refused by promote and by serve; the honest one is taken by both."""
    shop = Workshop(tmp_path, empty_store)
    shop.bundle(1)
    shop.promote(1)
    tiny = write_tiny_bundle(tmp_path / "tiny")
    signing = SigningConfig(private_key=f"{tmp_path}/keys/signing.pem")
    sign_bundle(str(tiny), signing)
    trust = TrustConfig(public_keys=(f"{tmp_path}/keys/signing.pem.pub",))
    pin(ServeConfig(bundle=str(tiny), trust=trust))
    refused = Counter[str]()
    for number in range(50):
        shop.bundle(100 + number)
        painting = tmp_path / f"painting-{number}"
        shutil.copytree(tiny, painting)
        for folder in (shop.folder / str(100 + number) / "bundle", painting):
            tamper(folder, number, shop.folder / "1" / "bundle")
        with pytest.raises(UserError) as of_promote:
            shop.promote(100 + number)
        with pytest.raises(UserError) as of_serve:
            pin(ServeConfig(bundle=str(painting), trust=trust))
        for error in (of_promote.value, of_serve.value):
            assert error.setting in ("bundle", "evaluation"), error
            refused[error.setting] += 1
    assert shop.aliases()["champion"] == 1
    assert len(versions.listing(shop.cfg)) == 1
    print(f"50 bundles, 0 promoted, 0 served, refused for {dict(refused)}")


def tamper(folder: Path, number: int, other: Path) -> None:
    """One of ten ways, with weights, seal and signature changed in turn."""
    way, names = number % 10, ("adapter.safetensors", "aligner.safetensors", "config.yaml", "meta.json")
    if way < 4:
        flip(folder / names[way])
    elif way == 4:
        (folder / SIGNATURE).unlink()
    elif way == 5:
        flip(folder / SIGNATURE)
    elif way == 6:  # the signature of an honest bundle
        (folder / SIGNATURE).write_bytes((other / SIGNATURE).read_bytes())
    elif way == 7:  # all metrics better
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "metrics": {"r1": 1.0 - number / 1000}}))
    elif way == 8:  # somebody else's key
        sign_bundle(str(folder), SigningConfig(private_key=str(folder.parent / "own.pem"), make_key=True))
    else:
        (folder / "MLmodel").write_text(f"flavors: {number}")
