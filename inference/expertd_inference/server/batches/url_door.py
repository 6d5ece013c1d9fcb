"""Asks a server by HTTP, a connection for each request."""

import asyncio
import ssl
from urllib.parse import urlsplit

import h11
import msgspec

from expertd_inference.server.batches.app_door import seconds_of
from expertd_inference.server.batches.batch_file import BatchRequest
from expertd_inference.server.batches.batch_run import Reply
from expertd_inference.server.keys import check_key
from expertstore.errors import InvalidInputError, UnavailableError

_PIECE_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}
_VERSION = "/v1"


class UrlDoor:
    """Asks the server at ``url``, with ``key`` if it wants one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises InvalidInputError if ``url`` is none of a server, or for no possible key."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInputError(f"--url {url!r:.200} is no URL: {error}.") from error
        if parts.scheme not in _PORTS or not host or not parts.path.isascii():
            raise InvalidInputError(
                f"--url {url!r:.200} is no URL of a server; give one as in http://127.0.0.1:8080."
            )
        check_key(key)
        self._url = url
        self._host, self._port = host, port or _PORTS[parts.scheme]
        self._name = parts.netloc.rpartition("@")[2]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        # Clients differ in whether the version belongs to the base.
        self._base = parts.path.rstrip("/").removesuffix(_VERSION)
        self._headers = [("Authorization", f"Bearer {key}")] if key else []

    async def __call__(self, request: BatchRequest) -> Reply:
        """Of :data:`.batch_run.Ask`. Raises UnavailableError if there is no answer."""
        body = msgspec.json.encode(request.body)
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise self._away(error) from error
        try:
            connection = h11.Connection(h11.CLIENT)
            head = h11.Request(
                method=request.method,
                target=self._base + request.url,
                headers=[
                    ("Host", self._name),
                    ("Content-Type", "application/json"),
                    ("Content-Length", str(len(body))),
                    ("Connection", "close"),
                    *self._headers,
                ],
            )
            for event in (head, h11.Data(body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            return await _reply(connection, reader)
        except (OSError, h11.RemoteProtocolError) as error:
            raise self._away(error) from error
        finally:
            # Which tells the server that nobody waits for the answer any more.
            writer.close()

    def _away(self, error: Exception) -> UnavailableError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return UnavailableError(
            f"The server at {self._url} does not answer: {reason}; start again once it does, and "
            "what is missing is asked."
        )


async def _reply(connection: h11.Connection, reader: asyncio.StreamReader) -> Reply:
    """What comes next. Raises h11.RemoteProtocolError if it is no whole answer."""
    status, headers, body = 0, {}, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE_BYTES))
        elif isinstance(event, h11.Response):
            status, headers = event.status_code, dict(event.headers)
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            request_id = headers.get(b"x-request-id", b"").decode("latin-1")
            return Reply(status, request_id, bytes(body), seconds_of(headers.get(b"retry-after")))
