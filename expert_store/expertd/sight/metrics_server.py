"""The metrics' HTTP door, on threads of its own; the store is read on its event loop only.

The loop pays for one snapshot of plain numbers however many ask at once: the text is made of
it here, and who asks while another's snapshot is being taken shares the next one.
"""

import asyncio
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socket import AF_INET, AF_INET6, socket
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest

from expertd.log import log_failure
from expertd.settings.loopback import LoopbackAddress, listen_remedy
from expertstore.errors import ConfigError

SNAPSHOT_SECONDS = 2.0
"""How long a scrape waits for the event loop, and for a scrape before it."""
MAX_CONNECTIONS = 16
_CLIENT_SECONDS = 5.0
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """The text that a scrape gets; ``collect`` runs on ``loop``, the rest where it is asked for."""

    def __init__(
        self, collect: Callable[[], Sequence[Metric]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._collect, self._loop = collect, loop
        self._process = ProcessCollector(registry=CollectorRegistry())
        self._lock = threading.Lock()
        self._began = float("-inf")
        self._text = b""

    def text(self) -> bytes:
        """State no older than this call. Raises TimeoutError if the event loop does not answer."""
        asked = time.monotonic()
        if not self._lock.acquire(timeout=SNAPSHOT_SECONDS):
            raise TimeoutError
        try:
            if self._began < asked:
                began = time.monotonic()
                self._text = generate_latest(
                    Families([*self._snapshot(), *self._process.collect()])
                )
                self._began = began
            return self._text
        finally:
            self._lock.release()

    def _snapshot(self) -> Sequence[Metric]:
        future: Future[Sequence[Metric]] = Future()

        def take() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._collect())
                except Exception as error:
                    future.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(take)
        except RuntimeError:  # it is closed
            raise TimeoutError from None
        try:
            return future.result(SNAPSHOT_SECONDS)
        except TimeoutError:
            future.cancel()  # else the loop would find a heap of them when it comes back
            raise


class MetricsServer:
    """Serves ``GET /metrics``. Raises :class:`ConfigError` if the address is taken."""

    def __init__(self, address: LoopbackAddress, exposition: Exposition) -> None:
        try:
            self._server = _Server(address, exposition)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served at {address}: {error.strerror}; {listen_remedy(error)}."
            ) from error
        self.address = LoopbackAddress(address.host, self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="expertd-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops; waits for the listener, so call it off the event loop. Twice is harmless."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Families:
    """What ``generate_latest`` wants of a registry."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return iter(self._families)


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's own: that one asks the resolver for its host's name.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    # With socketserver's 5, who connects as the sixth at once waits a second for a second try.
    request_queue_size = MAX_CONNECTIONS
    server_address: tuple[str, int]

    def __init__(self, address: LoopbackAddress, exposition: Exposition) -> None:
        self.address_family = AF_INET6 if ":" in address.host else AF_INET
        self.exposition = exposition
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((address.host, address.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:  # noqa: ANN401
        """A client that went away is no event; what else fails is answered in the handler."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_SECONDS
    server_version = "expertd"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"expertd's metrics are at /metrics\n")
            return
        try:
            text = self.server.exposition.text()
        except TimeoutError:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"expertd's event loop does not answer\n")
        except Exception:  # a bug of ours
            log_failure("a scrape")
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"expertd's log says what failed\n")
        else:
            self._answer(HTTPStatus.OK, text)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Scrapes are no events."""

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(body)
