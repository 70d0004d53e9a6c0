"""Whether a picture proves its origin, and the way back from it: model, trainings, tables, clips.

    aai verify dog.png                                  # the demo's registry
    aai verify dog.png --authorities ca.pem             # and whether one of these vouches for who signed
    aai verify dog.png --audio dog.wav                  # and whether this is the sound

Exit code 0: nothing was changed since it was signed, by somebody whom the authorities vouch for, if any are given.
Otherwise the reason is told and the exit code is 2; the way back is shown all the same, as what the picture says.
"""

import argparse
import hashlib
import logging
from typing import Any

from aai import storage
from aai.errors import UserError
from aai.proof import Proof, read_proof
from pipelines.settings import Plan, TrackingConfig, VerbConfig
from pipelines.tracing.telling import print_origin, words_of
from pipelines.tracing.walks import origin_of_picture

log = logging.getLogger(__name__)
MAX_BYTES = 64 * 2**20


class VerifyConfig(VerbConfig):
    """Which picture, and whom to believe."""

    picture: str | None = None
    """PNG file."""
    authorities: str | None = None
    """PEM file of the certificates whose holders vouch for those who sign pictures."""
    audio: str | None = None
    """Sound file that the picture should be of."""
    image: str | None = None
    """Picture that it should have been made from."""
    tracking: TrackingConfig = TrackingConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        where = f"{self.tracking.model_name} in {self.tracking.uri}"
        inputs = {"picture": self.picture or "(FILE)", "registry": where}
        return Plan(inputs=inputs, outputs={}, resources={"cluster": "none, this process"})


CONFIG = VerifyConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("picture", metavar="FILE", nargs="?", help="the PNG file")
    parser.add_argument("--authorities", metavar="FILE", help="PEM file of who vouches for signers")
    parser.add_argument("--audio", metavar="FILE", help="the sound that it should be of")
    parser.add_argument("--image", metavar="FILE", help="the picture that it should have been made from")
    return {name: name for name in ("picture", "authorities", "audio", "image")}


def run(config: VerifyConfig) -> dict[str, Any]:
    """Prints and returns what a picture proves. Raises UserError when it does not prove it."""
    proof = read_proof(_read("picture", config.picture), config.authorities)
    by = f", signed by {proof.signer}" if proof.signer else ""
    print(f"{config.picture}: {proof.state}{by}{''.join(f'; {reason}' for reason in proof.reasons)}")
    made = proof.made
    result: dict[str, Any] = {"state": proof.state, "signer": proof.signer, "made": dict(made)}
    if made.get("bundle"):
        print(words_of(made))
        try:
            origin, found = origin_of_picture(config.tracking, made)
        except UserError as error:  # what a picture proves needs no registry
            print(f"unknown: {error}")
        else:
            print_origin(origin, found)
            runs = [training.run_id for training in origin.trainings]
            result |= {"versions": [version.version for version in found], "runs": runs, "clips": origin.by_split()}
    _refuse(config, proof)
    log.info("verify: %s is %s", config.picture, proof.state)
    return result


def _refuse(config: VerifyConfig, proof: Proof) -> None:
    """Raises UserError for a picture that does not prove what it says."""
    picture = config.picture
    if proof.state == "missing":
        rule = "carries no manifest: what it says of itself anybody can have written"
        raise UserError("picture", picture, rule, "paint with proof.certificate, and keep the file as it was painted")
    if proof.state == "broken":
        rule = f"was changed since it was signed, or the manifest is another's ({'; '.join(proof.reasons)})"
        raise UserError("picture", picture, rule, "get the file as it was painted")
    if config.authorities and proof.state != "trusted":
        rule = f"was signed by {proof.signer}, for whom none of {config.authorities} vouches"
        raise UserError("picture", picture, rule, "do not believe it, or add who issued that certificate")
    for name, uri in (("audio", config.audio), ("image", config.image)):
        if uri is None:
            continue
        sums = _sums(proof) if name == "audio" else [proof.made.get("image_sha256")]
        if hashlib.sha256(_read(name, uri)).hexdigest() not in sums:
            raise UserError(name, uri, f"is not what {picture} was made from", "give the file as it was handed in")


def _sums(proof: Proof) -> list[object]:
    sounds = proof.made.get("sounds")
    return list(sounds.values()) if isinstance(sounds, dict) else []


def _read(setting: str, uri: str | None) -> bytes:
    if uri is None:
        raise UserError(setting, "(missing)", "there is nothing to look at", "give a PNG file")
    if not storage.exists(uri):
        raise UserError(setting, uri, "no such file", "check the path")
    try:
        return storage.read_bytes(uri, MAX_BYTES)
    except ValueError as error:
        raise UserError(setting, uri, str(error), "give a smaller file") from error
