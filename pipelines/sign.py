"""Signs a bundle: BUNDLE/model.sig says whose it is, and that nothing of it was changed since.

    aai sign                                          # the demo's bundle with the demo's key
    aai sign --bundle runs/mine/adapt/bundle --key ~/keys/team.pem

`aai adapt` signs what it trains where `signing.private_key` is set; this command signs what is there. With --new-key a
key is made where there is none. Whoever checks (`trust.public_keys` of promote and serve) needs the file KEY.pub.
"""

import argparse
import logging
from typing import Any

from aai import storage
from aai.bundle import sign_bundle
from aai.errors import UserError
from aai.signatures import SIGNATURE, SigningConfig
from pipelines.settings import Plan, VerbConfig

log = logging.getLogger(__name__)


class SignConfig(VerbConfig):
    """Which bundle is signed, with what."""

    bundle: str
    """Bundle folder or s3:// prefix."""
    signing: SigningConfig = SigningConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        inputs = {"bundle": self.bundle, "key": self.signing.private_key or "(--key)"}
        signature = storage.join(self.bundle, SIGNATURE)
        return Plan(inputs=inputs, outputs={"signature": signature}, resources={"cluster": "none, this process"})


CONFIG = SignConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder")
    parser.add_argument("--key", metavar="FILE", help="PEM file of the private key")
    parser.add_argument("--new-key", action="store_true", help="make the key, and KEY.pub, where there is none")
    return {"bundle": "bundle", "key": "signing.private_key", "new_key": "signing.make_key"}


def run(config: SignConfig) -> dict[str, Any]:
    """Writes the signature and returns who signed what. Raises UserError for a broken bundle, or no key."""
    if config.bundle.startswith("models:"):
        rule, remedy = "a registered version is not changed", "sign the folder, then `aai promote` registers it signed"
        raise UserError("bundle", config.bundle, rule, remedy)
    by, where = sign_bundle(config.bundle, config.signing), storage.join(config.bundle, SIGNATURE)
    log.info("sign: signed by %s -> %s", by, where)
    return {"signed_by": by, "signature": where}
