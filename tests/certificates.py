"""Certificates for tests: an authority, a daemon's, and as many clients' as are asked for."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Files:
    """Paths of PEM files."""

    ca: Path
    certificate: Path
    key: Path


class Authority:
    """Signs certificates and writes them below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self._count = 0
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.path))

    def issue(self, *names: str, **options: Any) -> Files:
        """A certificate for ``names`` (DNS names or IP addresses)."""
        self._count += 1
        issued = self._ca.issue_cert(*names, **options)
        files = self._paths()
        for chained in issued.cert_chain_pems:
            chained.write_to_path(str(files.certificate), append=True)
        issued.private_key_pem.write_to_path(str(files.key))
        return files

    def with_uri(self, uri: str) -> Files:
        """A certificate for a URI, which trustme does not make."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
            )
            .sign(self._signing_key(), hashes.SHA256())
        )
        self._count += 1
        files = self._paths()
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def expired(self, *names: str) -> Files:
        """One that was good until yesterday."""
        return self.issue(
            *names,
            not_before=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            not_after=datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC),
        )

    def _paths(self) -> Files:
        stem = self._directory / str(self._count)
        return Files(self.path, stem.with_suffix(".pem"), stem.with_suffix(".key"))

    def _signing_key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def tcp_settings(server: Files, *names: str, listen: str = "127.0.0.1:0") -> str:
    """The ``[tcp]`` table of a daemon with that certificate, for clients of the same authority."""
    return f"""
[tcp]
listen = "{listen}"
certificate = "{server.certificate}"
key = "{server.key}"
client_ca = "{server.ca}"
allowed_names = [{", ".join(f'"{name}"' for name in names)}]
"""
