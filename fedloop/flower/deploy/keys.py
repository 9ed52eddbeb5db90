"""Certificates and node keys for a federation on one machine, where nobody has to hand them
around.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

_LIFE = timedelta(days=3650)  # they are for 127.0.0.1, in a folder that only its owner reads


def make_certificates(folder: Path) -> None:
    """ca.crt, server.pem and server.key for 127.0.0.1; the authority's own key is not kept."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    authority, server, now = (
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP384R1()),
        datetime.now(UTC),
    )
    issuer, subject = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        for name in ("fedloop on this machine", "127.0.0.1")
    )

    def certificate(
        name: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *extensions: tuple[x509.ExtensionType, bool],
    ) -> bytes:
        built = x509.CertificateBuilder(
            issuer, name, key, x509.random_serial_number(), now - timedelta(minutes=5), now + _LIFE
        )
        for extension, critical in extensions:
            built = built.add_extension(extension, critical)
        return built.sign(authority, hashes.SHA384()).public_bytes(Encoding.PEM)

    public_key = authority.public_key()
    identity = x509.SubjectKeyIdentifier.from_public_key(public_key)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    names = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    )
    issued = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity)
    _write(
        folder / "ca.crt",
        certificate(
            issuer,
            public_key,
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (usage, True),
            (identity, False),
        ),
    )
    _write(
        folder / "server.pem",
        certificate(subject, server.public_key(), (names, False), (issued, False)),
    )
    _write(
        folder / "server.key",
        server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def make_node_key(path: Path) -> Path:
    """A private key, and beside it its public one: what `ssh-keygen -t ecdsa -b 384` writes.

    The public one's path.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key, public = ec.generate_private_key(ec.SECP384R1()), path.with_name(path.name + ".pub")
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return public


def _write(path: Path, content: bytes) -> None:
    """To a file that nobody else can read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
