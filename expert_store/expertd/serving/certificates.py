"""The daemon's TLS files: checked at start, read again when they change."""

import grpc

from expertd.log import log, log_warning
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import ConfigError
from expertstore.tls_files import read_identity

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
            log_warning("certificates not renewed", cause=error)
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
        identity = read_identity(*self._paths)
        return grpc.ssl_server_certificate_configuration(
            [(identity.key, identity.certificate)], identity.ca
        )
