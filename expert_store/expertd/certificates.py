"""The daemon's TLS files: checked at start, read again when they change."""

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from expertd.errors import ConfigError
from expertd.log import log
from expertd.tcp_config import TcpConfig

_Signature = tuple[tuple[int, int, int], ...]


class Certificates:
    """Certificate, key and client authorities. Raises :class:`ConfigError` if they are no use.

    They are looked at whenever a client connects. Where the new ones are no use, such as
    between the replacing of the certificate and that of its key, the old ones stay.
    """

    def __init__(self, config: TcpConfig) -> None:
        assert config.certificate is not None
        assert config.key is not None
        assert config.client_ca is not None
        self._paths = (config.certificate, config.key, config.client_ca)
        self._signature = self._look()
        self._current = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For a server that asks every client for its certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._renewed,  # type: ignore[arg-type] # None is "as before", which the stubs lack
            require_client_authentication=True,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The files' content if it is new; called by gRPC, on its threads, at each handshake."""
        signature = self._look()
        if signature == self._signature:
            return None
        self._signature = signature  # also if they are no use: that is said once
        try:
            self._current = self._read()
        except ConfigError as error:
            log("certificates not renewed", cause=error)
            return None
        log("certificates renewed", certificate=str(self._paths[0]))
        return self._current

    def _look(self) -> _Signature:
        """What changes when a file does; nothing of a file that is not there."""
        found = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, client_ca = (_content(path) for path in self._paths)
        for path, content in zip(self._paths[::2], (certificate, client_ca), strict=True):
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                    cadata=content.decode("ascii")
                )
            except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
                raise ConfigError(f"{path} holds no certificate in PEM form.") from error
        # What is checked is what will be used, whatever becomes of the files meanwhile.
        _with_file(certificate, lambda cert: _with_file(key, lambda its: self._check(cert, its)))
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)

    def _check(self, certificate: str, key: str) -> None:
        path = self._paths[1]
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                certificate, key, password=_no_password
            )
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                problem = f"{path} is not the key of the certificate {self._paths[0]}."
            else:
                problem = f"{path} holds no private key in PEM form that can be used."
            raise ConfigError(problem) from error
        except _EncryptedError:
            raise ConfigError(
                f"{path} is encrypted, and nobody is here to give its password; store it "
                "decrypted, readable by the daemon's user only."
            ) from None


class _EncryptedError(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedError


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _with_file(content: bytes, use: Callable[[str], None]) -> None:
    """Calls ``use`` with the name of a file that only this process sees."""
    fd = os.memfd_create("expertd-tls", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        use(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
