"""TLS files: each that is no use is named at start, and new ones come into force by themselves."""

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from expertd.serving.certificates import Certificates
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import ConfigError
from tests.certificates import Authority, Files


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Files:
    """Copies that a test may spoil."""
    issued = authority.issue("localhost")
    return Files(*(Path(shutil.copy(path, tmp_path)) for path in vars(issued).values()))


def config(files: Files) -> TcpConfig:
    return TcpConfig(
        listen="127.0.0.1:0",
        certificate=files.certificate,
        key=files.key,
        client_ca=files.ca,
        allowed_names=("worker",),
    )


@pytest.mark.parametrize("which", ["ca", "certificate", "key"])
def test_a_missing_file(files: Files, which: str) -> None:
    getattr(files, which).unlink()
    with pytest.raises(ConfigError, match=f"{getattr(files, which)} cannot be read: No such file"):
        Certificates(config(files))


@pytest.mark.parametrize("which", ["ca", "certificate"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_no_certificate(files: Files, which: str, content: bytes) -> None:
    getattr(files, which).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{getattr(files, which)} holds no certificate"):
        Certificates(config(files))


def test_no_key(files: Files) -> None:
    files.key.write_text("no key")
    with pytest.raises(ConfigError, match=f"{files.key} holds no private key"):
        Certificates(config(files))


def test_the_key_of_another(files: Files, authority: Authority) -> None:
    shutil.copy(authority.issue("localhost").key, files.key)
    with pytest.raises(ConfigError, match=f"{files.key} is not the key of .*{files.certificate}"):
        Certificates(config(files))


def test_an_encrypted_key_is_refused_and_not_asked_about(files: Files) -> None:
    key = load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(ConfigError, match=f"{files.key} is encrypted"):
        Certificates(config(files))


def test_new_files_are_taken_once_they_fit_together(files: Files, authority: Authority) -> None:
    certificates = Certificates(config(files))
    assert certificates._renewed() is None
    renewed = authority.issue("localhost")
    shutil.copy(renewed.certificate, files.certificate)
    assert certificates._renewed() is None, "its key is still the old one"
    shutil.copy(renewed.key, files.key)
    assert certificates._renewed() is not None
    assert certificates._renewed() is None
    files.key.unlink()
    assert certificates._renewed() is None
