"""Why no call reaches a TCP port, which gRPC says in the words of its insides.

So one connection is made again by hand, with Python's own TLS, whose errors can be told apart.
"""

import socket
import ssl

from expertstore.errors import (
    ExpertdError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
)
from expertstore.tls_files import TlsIdentity, load_identity

_SECONDS = 2.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_TLS_ALERT = b"\x15\x03"

# OpenSSL's X509_V_ERR_*.
_NOT_YET, _EXPIRED = 9, 10
_WRONG_HOST, _WRONG_IP = 62, 64


def explain(
    host: str, port: int, identity: TlsIdentity | None, certificate: str
) -> ExpertdError | None:
    """What is wrong, or None if nothing is; ``certificate`` is the file's name, for the message."""
    where = f"tcp://{host}:{port}"
    try:
        with socket.create_connection((host, port), _SECONDS) as connection:
            if identity is None:
                return _explain_plaintext(connection, where)
            return _explain_tls(connection, host, where, identity, certificate)
    except socket.gaierror as error:
        return UnavailableError(f"The host of {where} is not known ({error.strerror}).")
    except ConnectionRefusedError:
        return UnavailableError(
            f"No expertd answers at {where} (connection refused); is it running, with that "
            "port as tcp.listen?"
        )
    except OSError as error:
        reason = error.strerror or str(error)
        return UnavailableError(f"No expertd answers at {where} ({reason}); is it reachable?")


def _explain_plaintext(connection: socket.socket, where: str) -> ExpertdError | None:
    answer = b""
    try:
        connection.sendall(_PREFACE)
        answer = connection.recv(2)
    except ConnectionResetError:
        pass
    if not answer or answer == _TLS_ALERT:
        return PreconditionError(f"{where} wants TLS; give tls=TlsFiles(ca, certificate, key).")
    return None


def _explain_tls(
    connection: socket.socket, host: str, where: str, identity: TlsIdentity, certificate: str
) -> ExpertdError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=identity.ca.decode("ascii"))
    load_identity(context, identity)
    context.set_alpn_protocols(["h2"])
    try:
        tls = context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return PreconditionError(_about_theirs(error, host, where))
    except (ssl.SSLError, ConnectionError, EOFError) as error:
        reason = getattr(error, "reason", None) or ""
        if "ALERT" in reason:
            return _refused(where, certificate, reason)
        return PreconditionError(
            f"{where} does not speak TLS; it is another service's port, or has tcp.plaintext."
        )
    with tls:
        # With TLS 1.3 the daemon looks at our certificate after our side is content.
        try:
            if tls.recv(1):
                return None
        except TimeoutError:
            return None
        except (ssl.SSLError, ConnectionError) as error:
            return _refused(where, certificate, getattr(error, "reason", None) or "")
    return _refused(where, certificate, "")


def _about_theirs(error: ssl.SSLCertVerificationError, host: str, where: str) -> str:
    if error.verify_code == _EXPIRED:
        return f"The certificate of {where} has expired; it must be renewed on that host."
    if error.verify_code == _NOT_YET:
        return f"The certificate of {where} is not valid yet; is one of the clocks wrong?"
    if error.verify_code in (_WRONG_HOST, _WRONG_IP):
        return (
            f"The certificate of {where} is not for {host}; connect under a name that it has, "
            "or issue it for this one."
        )
    return (
        f"The certificate of {where} is not signed by an authority in the ca file "
        f"({error.verify_message}); give the one that signed it."
    )


def _refused(where: str, certificate: str, reason: str) -> ExpertdError:
    said = f" ({reason.lower().replace('_', ' ')})" if reason else ""
    return PermissionDeniedError(
        f"{where} refuses the certificate {certificate}{said}: it has expired, or no authority "
        "in the daemon's tcp.client_ca has signed it."
    )
