"""The server's life: sockets, models, requests, and a quiet end."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.app import make_app
from expertd_inference.server.batches.limited_door import LimitedDoor, at_once_beside_others
from expertd_inference.server.chat.families import family_named
from expertd_inference.server.front import MAX_BODY_BYTES, Front
from expertd_inference.server.guard import Guard
from expertd_inference.server.hosting.catalog import Catalog
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.keys import Keys
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.patient_protocol import PatientProtocol
from expertd_inference.server.variants import read_variants
from expertstore.errors import InvalidInputError

BACKLOG = 2048
_FIRST_PASSED_FD = 3
"""Where systemd's sockets begin (sd_listen_fds(3))."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where a server listens, and what it serves.

    ``port`` 0 takes a free one. ``preload`` names models whose engines start at once; the only
    model of a daemon does anyway. ``variants`` is a file of models with other defaults
    (:mod:`.variants`). ``chat_format`` is how answers have reasoning and calls of
    tools; None finds out by the template. With ``request_templates`` requests may bring their own
    template, which is a program. Requests may name files in ``images``. An engine without requests
    for ``idle_seconds`` ends; None keeps it. On its end the server waits for ``drain_seconds``
    until answers are complete. ``keys`` is a file of users (:mod:`.keys`); without it, and without
    ``no_auth``, it listens to this host only. Pages of ``cors_origins`` may use it. Files and
    batches of clients are kept in ``state``; without it there are none. If it ``is_embedded``, no
    other models come than those at the start. Raises InvalidInputError if that does not fit.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    preload: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    variants: Path | None = None
    chat_template: Path | None = None
    chat_format: str | None = None
    request_templates: bool = False
    images: Path | None = None
    idle_seconds: float | None = None
    drain_seconds: int = 60
    keys: Path | None = None
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    https_cert: Path | None = None
    https_key: Path | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    state: Path | None = None
    is_embedded: bool = False

    def __post_init__(self) -> None:
        if self.chat_format is not None:
            family_named(self.chat_format)
        self.check_address(self.host, f"--host {self.host}")
        if (self.https_cert is None) != (self.https_key is None):
            raise InvalidInputError("--https-cert and --https-key belong together; give both.")
        if self.images is not None and not self.images.is_dir():
            raise InvalidInputError(f"--images {self.images} is no directory; name one of images.")

    def check_address(self, host: str, name: str) -> None:
        """Raises InvalidInputError if others reach ``host`` and neither is set."""
        if self.keys is None and not self.no_auth and not _is_loopback(host):
            raise InvalidInputError(
                f"{name} is open to other hosts: give --keys FILE, so that only whom you gave a "
                "key may ask, or --no-auth if anybody may."
            )


def run_server(
    settings: ServerSettings, specs: Sequence[EngineSpec], say: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT; ``say`` writes a line of the log.

    Each model has an engine for each of ``specs``, whose own name of a model is not used.
    Raises InvalidInputError if it cannot listen, and what loading the first models raises.
    """
    uvloop.run(_serve(settings, specs, say))


async def _serve(
    settings: ServerSettings, specs: Sequence[EngineSpec], say: Callable[[str], None]
) -> None:
    keys = None if settings.keys is None else Keys(settings.keys)
    accounts, metrics = Accounts(), ServerMetrics()
    listening = passed_socket()
    if listening is None:
        listening = bound_socket(settings.host, settings.port)
    elif listening.family != socket.AF_UNIX:
        host = str(listening.getsockname()[0])
        settings.check_address(host, f"The socket unit's address {host}")
    _raise_file_limit()
    catalog = Catalog(
        specs,
        aliases=settings.aliases,
        variants=read_variants(settings.variants),
        template=read_template(settings.chat_template),
        chat_format=settings.chat_format,
        images=settings.images,
        idle_seconds=settings.idle_seconds,
        accounts=accounts,
        metrics=metrics,
        say=say,
    )
    with listening:
        try:
            await check_names(catalog, settings, say)
            serves = await _preload(catalog, settings.preload)
            front = Front(
                catalog,
                metrics,
                say,
                settings.max_body_bytes,
                request_templates=settings.request_templates,
            )
            routes = make_app(front)
            app = Guard(
                _with_cors(routes, settings.cors_origins),
                keys=keys,
                accounts=accounts,
                origins=settings.cors_origins,
                say=say,
                anybody=settings.no_auth,
            )
            server = _Server(
                uvicorn.Config(
                    app,
                    http=PatientProtocol,
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    ws="none",
                    server_header=False,
                    backlog=BACKLOG,
                    timeout_graceful_shutdown=settings.drain_seconds,
                    ssl_certfile=settings.https_cert,
                    ssl_keyfile=settings.https_key,
                )
            )
            listening.listen(BACKLOG)
            print(f"serving {serves}, listening on {url_of(listening, settings)}", flush=True)  # noqa: T201
            async with AsyncExitStack() as stack:
                if settings.state is not None:
                    door = partial(LimitedDoor, routes, accounts, keys)
                    places = sum(spec.limits.max_sequences for spec in specs)
                    at_once = at_once_beside_others(places)
                    await stack.enter_async_context(front.room.kept(settings.state, door, at_once))
                await server.serve([listening])
        finally:
            await catalog.close()


class _Server(uvicorn.Server):
    """One that a signal ends in order, and whose process then ends well."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Of uvicorn, which would raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises InvalidInputError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise InvalidInputError(
            f"The server cannot listen on {host}:{port}: {error.strerror}; choose another with "
            "--host and --port."
        ) from error
    return bound


def passed_socket() -> socket.socket | None:
    """The one that systemd has made for this process, if it has."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    return socket.socket(fileno=_FIRST_PASSED_FD)


def url_of(listening: socket.socket, settings: ServerSettings) -> str:
    """Where clients find it."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    scheme = "http" if settings.https_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_file_limit() -> None:
    """To what this process may have: each connection takes a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _with_cors(app: Starlette, origins: tuple[str, ...]) -> Starlette | CORSMiddleware:
    if not origins:
        return app
    return CORSMiddleware(app, allow_origins=origins, allow_methods=("*",), allow_headers=("*",))


async def check_names(
    catalog: Catalog, settings: ServerSettings, say: Callable[[str], None]
) -> None:
    """Says which names wait for a model. Raises InvalidInputError for an alias that gets none."""
    served = ", ".join(entry.name for entry in await catalog.entries())
    for name, model in catalog.waiting_names().items():
        if settings.is_embedded and name in settings.aliases:
            raise InvalidInputError(
                f"--alias {name}={model} names a model that is not served; give one of: {served}."
            )
        say(f"{name} waits for a model {model!r}, which the daemon does not have yet")


async def _preload(catalog: Catalog, names: tuple[str, ...]) -> str:
    """Starts engines; what is served, in a phrase."""
    entries = await catalog.entries()
    first = [await catalog.find(name) for name in names]
    if len(entries) == 1:
        first = entries
    parts = []
    for entry in first:
        greetings, _ = await asyncio.gather(entry.hosted.ready(), catalog.text(entry))
        engines = [
            f"executor {ready.executor} on {seat.spec.place}, room for {ready.stats.kv_tokens} "
            "tokens"
            for seat, ready in zip(entry.hosted.seats, greetings, strict=True)
        ]
        parts.append(f"{entry.name} ({'; '.join(engines)})")
    others = [entry.name for entry in entries if entry not in first]
    if others:
        parts.append(f"{', '.join(others)} when asked for")
    return ", ".join(parts) or "no model yet"


def read_template(path: Path | None) -> str | None:
    """A file of --chat-template. Raises InvalidInputError."""
    try:
        return None if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"The chat template {path} cannot be read: {error}.") from error
