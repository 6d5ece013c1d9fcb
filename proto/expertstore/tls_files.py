"""PEM files of certificates and keys, for both sides: read, and known to be of use."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from expertstore.errors import ConfigError


@dataclass(frozen=True)
class TlsIdentity:
    """The content of three PEM files: who one is, and whom one believes."""

    certificate: bytes
    key: bytes
    ca: bytes


def read_identity(certificate: Path, key: Path, ca: Path) -> TlsIdentity:
    """Reads the files. Raises :class:`ConfigError` naming the one that is of no use."""
    identity = TlsIdentity(*(_content(path) for path in (certificate, key, ca)))
    for path, content in ((certificate, identity.certificate), (ca, identity.ca)):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                cadata=content.decode("ascii")
            )
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"{path} holds no certificate in PEM form.") from error
    try:
        load_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), identity)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"{key} is not the key of the certificate {certificate}."
        else:
            problem = f"{key} holds no private key in PEM form that can be used."
        raise ConfigError(problem) from error
    except _EncryptedError:
        raise ConfigError(
            f"{key} is encrypted, and nobody is here to give its password; store it decrypted, "
            "readable by its user only."
        ) from None
    return identity


def load_identity(context: ssl.SSLContext, identity: TlsIdentity) -> None:
    """Gives certificate and key to ``context``, which takes them from files only.

    So they are put into some that only this process sees: what is loaded is what was read,
    whatever becomes of the files meanwhile. Raises ssl.SSLError.
    """
    files = [os.memfd_create("expertd-tls", os.MFD_CLOEXEC) for _ in range(2)]
    try:
        for fd, content in zip(files, (identity.certificate, identity.key), strict=True):
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
        certificate, key = (f"/proc/self/fd/{fd}" for fd in files)
        context.load_cert_chain(certificate, key, password=_no_password)
    finally:
        for fd in files:
            os.close(fd)


class _EncryptedError(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedError


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
