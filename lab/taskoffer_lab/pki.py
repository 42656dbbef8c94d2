"""A cluster's own certificate authority, its certificates and its kubeconfig files."""

import base64
import datetime as dt
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALIDITY = dt.timedelta(days=30)
"""A lab cluster does not live longer; a leaked key soon ends."""

_BACKDATED = dt.timedelta(hours=1)  # Clocks of the user's other machines may be behind.


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class CertificateAuthority:
    """Signs the certificates of one cluster (ECDSA P-256: 20 times cheaper to make than RSA-2048)."""

    def __init__(self, common_name: str, now: dt.datetime | None = None) -> None:
        self._now = now or dt.datetime.now(dt.UTC)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        self._certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pair(self) -> KeyPair:
        """The authority's own certificate and key."""
        return KeyPair(_pem(self._certificate), private_pem(self._key))

    def client(self, user: str, group: str | None = None) -> KeyPair:
        """Return a client certificate: Kubernetes reads CN as the user and O as a group."""
        return self._issue(user, group, (), ExtendedKeyUsageOID.CLIENT_AUTH)

    def server(self, common_name: str, names: Sequence[str]) -> KeyPair:
        """Return a serving certificate for `names` (DNS names and IP addresses)."""
        return self._issue(common_name, None, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def _issue(
        self, common_name: str, group: str | None, names: Sequence[str], usage: x509.ObjectIdentifier
    ) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if group is not None:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            self._builder(x509.Name(attributes), key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        if names:
            alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        return KeyPair(_pem(builder.sign(self._key, hashes.SHA256())), private_pem(key))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - _BACKDATED)
            .not_valid_after(self._now + VALIDITY)
        )


def signing_key() -> bytes:
    """Return a new private key (PEM) for ServiceAccount tokens (ES256)."""
    return private_pem(ec.generate_private_key(ec.SECP256R1()))


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted SEC1 PEM, the form that every Kubernetes component reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def write_secret(path: Path, content: bytes) -> Path:
    """Write `content` to a file that only this user can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return path


def write_pair(folder: Path, name: str, pair: KeyPair) -> None:
    """Write `NAME.crt` and `NAME.key` into `folder`."""
    write_secret(folder / f"{name}.crt", pair.certificate)
    write_secret(folder / f"{name}.key", pair.key)


def kubeconfig(cluster: str, server: str, authority: bytes, client: KeyPair) -> dict[str, Any]:
    """Return a kubeconfig with everything inline, so that it can be copied anywhere.

    Args:
        cluster: The cluster's name; the context has the same one.
        server: `https://ADDRESS:PORT`.
        authority: The authority's certificate, PEM.
        client: The user's certificate and key.
    """
    user = {
        "client-certificate-data": _base64(client.certificate),
        "client-key-data": _base64(client.key),
    }
    target = {"server": server, "certificate-authority-data": _base64(authority)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": cluster,
        "clusters": [{"name": cluster, "cluster": target}],
        "users": [{"name": cluster, "user": user}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
    }


def write_kubeconfig(path: Path, content: dict[str, Any]) -> Path:
    """Write a kubeconfig (JSON is YAML) that only this user can read."""
    return write_secret(path, json.dumps(content, indent=1).encode() + b"\n")


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
