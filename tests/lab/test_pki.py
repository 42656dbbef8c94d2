"""Certificates and kubeconfigs of a lab cluster."""

import datetime as dt
import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from taskoffer_lab.api_client import ClientConfig
from taskoffer_lab.errors import LabError
from taskoffer_lab.pki import CertificateAuthority, KeyPair, kubeconfig, write_kubeconfig, write_pair

NOW = dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority("test", NOW)


def certificate(pair: KeyPair) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair.certificate)


def test_a_client_certificate_names_user_and_group_and_cannot_serve(authority: CertificateAuthority) -> None:
    found = certificate(authority.client("system:node:node-a", "system:nodes"))
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "system:node:node-a"
    assert found.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "system:nodes"
    usages = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize("name", ["127.0.0.1", "10.96.0.1", "kubernetes.default.svc"])
def test_a_server_certificate_is_trusted_for_its_names_only(authority: CertificateAuthority, name: str) -> None:
    served = certificate(authority.server("kube-apiserver", ["127.0.0.1", "10.96.0.1", "kubernetes.default.svc"]))
    alternatives = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    listed = [str(item.value) for item in alternatives]
    assert name in listed
    verifier = PolicyBuilder().time(NOW).store(Store([certificate(authority.pair)]))
    verifier.build_server_verifier(x509.DNSName("kubernetes.default.svc")).verify(served, [])
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("elsewhere.svc")).verify(served, [])


def test_a_certificate_of_another_authority_is_not_trusted(authority: CertificateAuthority) -> None:
    foreign = certificate(CertificateAuthority("other", NOW).server("x", ["kubernetes.default.svc"]))
    verifier = PolicyBuilder().time(NOW).store(Store([certificate(authority.pair)]))
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("kubernetes.default.svc")).verify(foreign, [])


def test_certificates_hold_from_an_hour_ago_for_thirty_days(authority: CertificateAuthority) -> None:
    found = certificate(authority.client("u"))
    assert found.not_valid_before_utc == NOW - dt.timedelta(hours=1)
    assert found.not_valid_after_utc == NOW + dt.timedelta(days=30)


def test_a_key_fits_its_certificate_and_only_its_owner_can_read_it(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    pair = authority.client("u")
    write_pair(tmp_path, "u", pair)
    key = load_pem_private_key((tmp_path / "u.key").read_bytes(), None)
    assert key.public_key() == certificate(pair).public_key()
    assert stat.S_IMODE((tmp_path / "u.key").stat().st_mode) == 0o600


def test_a_kubeconfig_is_read_back_with_everything_inline(authority: CertificateAuthority, tmp_path: Path) -> None:
    pair = authority.client("admin", "system:masters")
    content = kubeconfig("lab", "https://127.0.0.1:6443", authority.pair.certificate, pair)
    path = write_kubeconfig(tmp_path / "config", content)
    found = ClientConfig.from_kubeconfig(path)
    assert found.server == "https://127.0.0.1:6443"
    assert found.certificate == pair.certificate.decode()
    assert found.key == pair.key.decode()
    assert found.authority == authority.pair.certificate.decode()
    found.ssl_context()  # OpenSSL accepts the pair.


def kubeconfig_with(user: dict[str, str]) -> dict[str, object]:
    return {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://h:1"}}],
        "users": [{"name": "u", "user": user}],
    }


def test_a_kubeconfig_with_a_token_sends_it(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(json.dumps(kubeconfig_with({"token": "abc"})))
    assert ClientConfig.from_kubeconfig(tmp_path / "c").headers == {"Authorization": "Bearer abc"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(kubeconfig_with({"exec": "aws"})), "neither a client certificate nor a token"),
        ("{}", "cannot be read"),
        ("a: [", "cannot be read"),
        (json.dumps({**kubeconfig_with({}), "current-context": "absent"}), "cannot be read"),
    ],
    ids=["login plugin", "empty", "no YAML", "unknown context"],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c").write_text(content)
    with pytest.raises(LabError, match=message):
        ClientConfig.from_kubeconfig(tmp_path / "c")


def test_a_kubeconfig_may_name_files_beside_it(authority: CertificateAuthority, tmp_path: Path) -> None:
    write_pair(tmp_path, "u", authority.client("u"))
    user = {"client-certificate": "u.crt", "client-key": "u.key"}
    (tmp_path / "c").write_text(json.dumps(kubeconfig_with(user)))
    assert ClientConfig.from_kubeconfig(tmp_path / "c").key == (tmp_path / "u.key").read_text()
