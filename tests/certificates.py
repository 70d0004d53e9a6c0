"""Certificates of our own, for signatures."""

import datetime
import hashlib
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

PEM = serialization.Encoding.PEM
Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def certified(folder: Path, name: str, issuer: Authority | None = None, valid_s: float = 9e8) -> Authority:
    """NAME.pem (the key) and NAME.crt in a folder: an authority, or with an issuer a certificate for signing.

    NAME.chain is the certificate and the issuer's.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    names = ((x509.NameOID.ORGANIZATION_NAME, "Tests"), (x509.NameOID.COMMON_NAME, name))
    subject = x509.Name([x509.NameAttribute(oid, text) for oid, text in names])
    by, by_key = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    now, is_root = datetime.datetime.now(datetime.UTC), issuer is None
    usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
    made = x509.CertificateBuilder(
        by, subject, key.public_key(), x509.random_serial_number(), now, now.replace(year=2099)
    )
    made = made.add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
    made = made.add_extension(usage, critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if not is_root:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key())
        made = made.add_extension(above, critical=False)
    certificate = made.sign(by_key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(PEM))
    chain = [certificate, *([issuer[0]] if issuer else [])]
    (folder / f"{name}.chain").write_bytes(b"".join(each.public_bytes(PEM) for each in chain))
    return certificate, key


def for_this_machine(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate that nobody but itself vouches for, of a server at 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=9)
    )
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = made.add_extension(here, critical=False).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8
    (folder / "server.pem").write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
    (folder / "server.crt").write_bytes(certificate.public_bytes(PEM))
    return folder / "server.pem", folder / "server.crt"


def fingerprint(public_key: Path) -> str:
    """How signatures name the holder of a public key: by the SHA-256 of its PEM."""
    return f"key {hashlib.sha256(public_key.read_bytes()).hexdigest()[:16]}"
