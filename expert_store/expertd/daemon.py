"""The daemon's life: start-up and shutdown as two numbered lists."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd.log import log, log_failure, log_warning, open_log
from expertd.manager.inheritance import FdStore, take_inheritance
from expertd.manager.systemd import ATTACH_NAME, Manager
from expertd.manager.watchdog import feed_watchdog
from expertd.memory.arena import Arena, check_memory
from expertd.memory.description import Origin
from expertd.serving.allow_list import AllowList
from expertd.serving.attach import AttachServer, adopt_listener, listen
from expertd.serving.edge import Edge
from expertd.serving.rundir import RunDirectory
from expertd.serving.service import ExpertStoreService
from expertd.serving.tcp import OPTIONS, PeerInterceptor, open_port
from expertd.settings.config import ServeConfig
from expertd.sight.metrics import StoreMetrics
from expertd.sight.metrics_server import Exposition, MetricsServer
from expertd.store import Store
from expertstore import __version__
from expertstore.errors import ShortMemoryError
from expertstore.shared.handshake import rpc_target
from expertstore.sizes import format_bytes
from expertstore.v1 import expert_store_pb2 as pb

_REFRESH_SECONDS = 0.05  # rings of 16 Ki touches: overrun only above 300 k accesses a second
_MAX_REQUEST_BYTES = 512 << 10  # lists of 36 k experts
_MAX_REF_BYTES = 14  # an ExpertRef with its tag and length, both numbers at their longest
_ROW_BYTES = 8  # a row's number; a call names as many as it brings, and as many that it found
_MAX_OTHER_BYTES = 16 << 10  # names, paths
_MAX_CALLS = 100  # at once on one connection; further ones wait in the caller
# Longer than workers keep what they have mapped (docs/protocol.md), and so long that systemd,
# which starts us again after it, never counts five failures in a minute.
_MEMORY_SECONDS = 15.0
_MEMORY_POLL_SECONDS = 0.2
_SERVICE = pb.DESCRIPTOR.services_by_name["ExpertStore"]


def serve(config: ServeConfig) -> None:
    """Runs a daemon until SIGTERM or SIGINT. Raises ``ConfigError`` and its siblings."""
    open_log(config.log_format)
    _raise_descriptor_limit()
    manager = Manager.take()
    try:
        uvloop.run(_serve(config, manager))
    finally:
        manager.close()
        _forget_unheard()


def _forget_unheard() -> None:
    """What nobody could be told must not fail the exit, at which Python tries again."""
    try:
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


async def _serve(config: ServeConfig, manager: Manager) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if not _has_terminal():
        loop.add_signal_handler(signal.SIGHUP, _explain_hangup)
    async with _running(config, manager) as (store, metrics):
        # Not earlier: a daemon that does not serve yet has nothing to end in order, and clearing
        # the memory of its arena may take minutes.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if _has_terminal():  # it has gone, and this process goes with it
            loop.add_signal_handler(signal.SIGHUP, stop.set)
        # What the starter waits for. If nobody can hear it (a full disk, a pipe that is closed),
        # that is no reason not to serve; and what print() could not flush would fail the exit.
        with contextlib.suppress(OSError):
            os.write(1, f"{_banner(store, metrics)}\n".encode(errors="replace"))
        await manager.ready()
        for warning in store.arena.warnings:  # not earlier: who refuses to start says one thing
            log_warning("degraded", text=warning)
        log("serving", version=__version__, incarnation=store.incarnation)
        await stop.wait()
        log("stopping", sessions=len(store.sessions))
        await manager.stopping()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _explain_hangup() -> None:
    """Settings are read once, and certificates looked at anyway: there is nothing to reload."""
    log_warning("SIGHUP ignored", advice="restart to read the settings again; it is warm")


@contextlib.asynccontextmanager
async def _running(
    config: ServeConfig, manager: Manager
) -> AsyncIterator[tuple[Store, MetricsServer | None]]:
    """A daemon that serves inside the ``with``; what is set up is undone in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        # 1. Own the directory: nothing of another daemon is touched before this.
        passed = manager.take_descriptors(ATTACH_NAME)
        directory = RunDirectory(config.socket, keeps_attach_socket=bool(passed))
        stack.callback(directory.close)
        allowed = AllowList(config.allowed_uids, config.allowed_groups)
        # 2. Memory: what the daemon before us left, or new, which may be refused.
        await manager.status("preparing the arena")
        fd_store = FdStore(manager)
        inheritance = await take_inheritance(manager, fd_store, config.ram_bytes)
        if inheritance.arena is None and manager.is_there:
            await _wait_for_memory(manager, config.ram_bytes)
        arena = await asyncio.to_thread(
            Arena, config.ram_bytes, lock=config.lock_memory, memory=inheritance.arena
        )
        stack.callback(arena.close)
        if inheritance.arena is None:
            await fd_store.put_arena(arena.memory)
        # 3. Models, which may be refused too; their records are verified if they were left.
        await manager.status("opening packs, and verifying records that were left")
        store = Store(config, arena, fd_store, inheritance)
        stack.push_async_callback(store.close)
        for name, model in config.models.items():
            await store.load_model(name, model.path, Origin.CONFIG, model.limits, model.disk_io)
        await store.load_inherited()
        # 4. The pulse that reads what workers wrote, and the one that says that we live.
        for pulse in (_refresh(store), feed_watchdog(manager, store.loader)):
            stack.push_async_callback(_cancel, asyncio.create_task(pulse))
        # 5. Sight, whose address may be taken.
        metrics = None
        if config.metrics is not None:
            exposition = Exposition(StoreMetrics(store).collect, asyncio.get_running_loop())
            metrics = MetricsServer(config.metrics, exposition)
            stack.push_async_callback(asyncio.to_thread, metrics.close)
        # 6. Doors: first RPC, then attach, since an attached worker calls at once.
        status = health.aio.HealthServicer()
        servers: list[grpc.aio.Server] = []
        stack.push_async_callback(_stop, servers, config.drain_seconds)
        servers.append(await _start_rpc(store, directory, status))
        if config.tcp.enabled:
            servers.append(await _start_tcp(store, status))
        stack.push_async_callback(status.enter_graceful_shutdown)
        stack.callback(store.stopping.set)
        if passed:
            listener = adopt_listener(passed[0], directory.attach_socket)
        else:
            listener = listen(directory.attach_socket, config.socket_mode)
        attach = AttachServer(store, listener, allowed, config.writable_uids)
        stack.callback(attach.close)
        yield store, metrics


async def _wait_for_memory(manager: Manager, num_bytes: int) -> None:
    """Until it is free, or for ``_MEMORY_SECONDS``: workers still let go of an old arena.

    With nobody to wait for, a person at a terminal, there is no use in it.
    """
    deadline, told = time.monotonic() + _MEMORY_SECONDS, False
    while time.monotonic() < deadline:
        try:
            check_memory(num_bytes)
        except ShortMemoryError as error:
            if not told:
                told = True
                log_warning("waiting for memory", cause=error)
                await manager.status("waiting for memory")
        else:
            return
        await asyncio.sleep(_MEMORY_POLL_SECONDS)


async def _start_rpc(
    store: Store, directory: RunDirectory, status: health.aio.HealthServicer
) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
            ("grpc.max_concurrent_streams", _MAX_CALLS),
        ],
    )
    server.add_generic_rpc_handlers((_handler(store, "rpc"),))
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    for name in ("", _SERVICE.full_name):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (_SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    server.add_insecure_port(rpc_target(directory.path))
    await server.start()
    directory.rpc_socket.chmod(store.config.socket_mode)
    return server


async def _start_tcp(store: Store, status: health.aio.HealthServicer) -> grpc.aio.Server:
    """A server of its own: limits for the network, and none of its checks for local workers."""
    server = grpc.aio.server(
        interceptors=[PeerInterceptor(store.peers, store.refusals)],
        options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES), *OPTIONS],
    )
    server.add_generic_rpc_handlers((_handler(store, "tcp"),))
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    address = open_port(server, store.config.tcp)
    await server.start()
    security = "plaintext" if store.config.tcp.plaintext else "mutual TLS"
    log("listening", tcp=address, security=security)
    return server


async def _stop(servers: list[grpc.aio.Server], drain_seconds: float) -> None:
    await asyncio.gather(*(server.stop(drain_seconds) for server in servers))


def _handler(store: Store, door: str) -> grpc.GenericRpcHandler:
    def longest_request() -> int:
        models = store.models.values()
        experts = max((model.num_entries for model in models), default=0)
        rows = max((table.max_rows for model in models for table in model.tables), default=0)
        return _MAX_OTHER_BYTES + max(experts * _MAX_REF_BYTES, 2 * rows * _ROW_BYTES)

    edge = Edge(store.config.stall_seconds, store.refusals, door, longest_request)
    return edge.handler(ExpertStoreService(store), _SERVICE)


async def _refresh(store: Store) -> None:
    while True:
        due = time.monotonic() + _REFRESH_SECONDS
        await asyncio.sleep(_REFRESH_SECONDS)
        store.loop_lag.observe(max(0.0, time.monotonic() - due))
        try:
            store.slots.refresh()
        except Exception:  # a bug of ours, but leases must go on ending
            log_failure("reading the session pages")


def _raise_descriptor_limit() -> None:
    """A session takes three descriptors: socket, page, RPC connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _banner(store: Store, metrics: MetricsServer | None) -> str:
    held = ", ".join(
        f"{model.name} ({model.num_entries} experts, "
        f"{format_bytes(model.manifest.expert_bytes)}, {model.path}, {model.disk})"
        for model in store.models.values()
    )
    arena = store.arena
    adopted = ""
    if store.arena.trailer.adoptions:
        kept = sum(model.counters.adopted_records for model in store.models.values())
        dropped = sum(model.counters.dropped_records for model in store.models.values())
        adopted = f"; took over {kept} records, dropped {dropped}"
    return (
        f"expertd {__version__} serves {held or 'no model yet'} at {store.config.socket}: arena "
        f"{format_bytes(arena.num_bytes)}, {format_bytes(arena.locked_bytes)} locked, "
        f"{format_bytes(arena.huge_page_bytes)} in huge pages{adopted}"
        f"{f'; metrics at http://{metrics.address}/metrics' if metrics else ''}."
    )
