"""The store: which models are loaded and which sessions attached. All on one event loop."""

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from expertd.disk.loader import Loader
from expertd.disk.opening import OpenPack, open_pack
from expertd.disk.page_cache import PageCache
from expertd.histogram import Histogram
from expertd.hosting.budget import Budget
from expertd.hosting.hosted_model import HostedModel, ModelState
from expertd.hosting.hosted_session import Connection, HostedSession
from expertd.hosting.peers import Peers
from expertd.hosting.quotas import Quotas
from expertd.hosting.read_ahead import ByteBudget
from expertd.hosting.records import Records
from expertd.hosting.scrubber import Scrubber
from expertd.hosting.slots import Slots
from expertd.log import log, log_failure, log_warning
from expertd.manager.adoption import adopt_records
from expertd.manager.inheritance import FdStore, Inheritance
from expertd.manager.systemd import Manager
from expertd.memory.arena import Arena
from expertd.memory.description import Description, Origin, new_directory
from expertd.memory.memfd import SharedMemory
from expertd.settings.config import ServeConfig, check_model_name
from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import NO_LIMITS, ModelLimits, pinned_bytes
from expertd.tables.room import TableRoom, room_for
from expertstore.errors import (
    CapacityError,
    ExpertdError,
    IncarnationError,
    NotFoundError,
    PackError,
    PreconditionError,
    UnauthenticatedError,
)
from expertstore.pack.files import check_path
from expertstore.pack.manifest import Fingerprinted, Manifest, read_manifest
from expertstore.shared.handshake import Role
from expertstore.shared.host_memory import memory_available

_DRAIN_POLL_SECONDS = 0.002
ResultT = TypeVar("ResultT")


class Store:
    """Made inside the running event loop that it is to live on."""

    def __init__(
        self,
        config: ServeConfig,
        arena: Arena,
        fd_store: FdStore | None = None,
        inheritance: Inheritance | None = None,
    ) -> None:
        self.config, self.arena = config, arena
        self._fd_store = fd_store or FdStore(Manager())
        self._inheritance = inheritance or Inheritance(None, {})
        self._stored_as: dict[str, str] = {}
        self.incarnation = secrets.token_hex(8)
        self.started_at = time.monotonic()
        self.started_time = time.time()
        self.models: dict[str, HostedModel] = {}
        self.sessions: dict[str, HostedSession] = {}
        self.peers = Peers(config.tcp)
        self.read_budget = ByteBudget(config.read_buffer_bytes)
        self.warnings = list(arena.warnings)
        self.refusals: Counter[tuple[str, str]] = Counter()
        """How often the door ("attach", "rpc", "tcp") was answered with the code of that name."""
        self.num_cut_off = 0
        self.loop_lag = Histogram()
        """How much later than it was due the event loop ran the daemon's pulse."""
        self._loop = asyncio.get_running_loop()
        self.loader = Loader(
            config.loader_threads,
            staged=not arena.huge_page_bytes,
            hint_depth=config.hint_depth,
        )
        page_cache_bytes = config.page_cache_bytes
        if page_cache_bytes is None:
            page_cache_bytes = memory_available() // 4
        self.page_cache = PageCache(page_cache_bytes)
        """What mapped reads leave there."""
        self._numbers = itertools.count(1)
        self._admission = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pinning: dict[HostedModel, asyncio.Task[None]] = {}
        self.stopping = asyncio.Event()
        left = [Path(each.pack) for each in self._inheritance.of_admins()]
        self.tables = _room_for_tables(config, arena, left)
        self.budget = Budget(arena.num_bytes - self.tables.num_bytes, self.models)
        self.slots = Slots(
            self.budget,
            arena.copy,
            self.models,
            self.sessions,
            self._cut_off,
            config.stall_seconds,
        )
        self.quotas = Quotas(
            config.quotas,
            config.default_quota_bytes,
            self.slots.refresh,
            config.fetch_seconds,
        )
        self.records = Records(
            arena,
            self.slots,
            self.loader,
            self.quotas,
            config.fetch_seconds,
            config.hint_depth,
        )
        self._scrubber = Scrubber(arena, self.models, self.loader, config.scrub_bytes_per_second)

    def __repr__(self) -> str:
        return f"Store({list(self.models.values())}, {len(self.sessions)} sessions, {self.slots})"

    # Models

    def model(self, name: str) -> HostedModel:
        """The model of that name. Raises :class:`NotFoundError`, listing those there are."""
        if name not in self.models:
            held = ", ".join(sorted(self.models)) or "none"
            raise NotFoundError(f"no model named {name!r} is loaded; loaded are: {held}.")
        return self.models[name]

    async def load_model(
        self,
        name: str,
        path: Path,
        origin: Origin = Origin.ADMIN,
        limits: ModelLimits = NO_LIMITS,
        disk_io: DiskIo | None = None,
    ) -> HostedModel:
        """Opens the pack in ``path`` (absolute) under ``name``; records come when they are used.

        They are read as ``disk_io`` says, or for None as the configuration does. Those that an
        earlier daemon left of the same pack are there already; those that ``limits`` pin are read
        from now on, which is not waited for. Raises :class:`PackError`, :class:`ConfigError` if
        the pack has not what is pinned, :class:`CapacityError` naming each term of the sum that
        the budget does not hold, :class:`PreconditionError` if the name is taken.
        """
        check_model_name(name)
        check_path(path)
        # To its end, even if the caller goes away: a model half loaded would be inherited.
        return await self._finish(self._load(name, path, origin, limits, disk_io))

    async def load_inherited(self) -> None:
        """Brings back what an administrator had loaded, and gives up what else was left."""
        inheritance = self._inheritance
        for left in inheritance.of_admins():
            try:
                await self.load_model(
                    left.name, Path(left.pack), left.origin, left.limits, left.disk_io
                )
            except ExpertdError as error:
                await inheritance.give_up(self._fd_store, left.name, error)
        for name in list(inheritance.models):
            await inheritance.give_up(self._fd_store, name, "no setting names it any more")
        self._start_pinning()

    async def _load(
        self, name: str, path: Path, origin: Origin, limits: ModelLimits, disk_io: DiskIo | None
    ) -> HostedModel:
        async with self._admission:
            if name in self.models:
                raise PreconditionError(f"a model named {name!r} is loaded already.")
            pack = await asyncio.to_thread(read_manifest, path)
            pinned = pinned_bytes(limits.pins, pack.manifest, name)
            self.budget.check_model(name, pack.manifest, limits, pinned)
            asked = disk_io or self.config.disk_io
            tables = self.tables.open(name, path, pack.manifest)
            try:
                opened = await asyncio.to_thread(
                    open_pack, path, pack.manifest, asked, self.page_cache
                )
                model = await self._inherit(name, path, pack, opened, limits)
                if model is None:
                    model = await self._begin(name, path, pack, opened, origin, limits, disk_io)
            except BaseException:
                await self.tables.close(tables)
                raise
            if opened.disk.way is DiskIo.DIRECT and not opened.disk.past_page_cache:
                self._warn(f"{path} is read through the page cache: no O_DIRECT there.")
            if opened.disk.trouble:
                self._warn(opened.disk.trouble)
            model.tables = tables
            self.models[name] = model
        log(
            "model loaded",
            model=name,
            path=str(path),
            experts=model.num_entries,
            disk=str(model.disk),
        )
        self.slots.trim(model)
        self._start_pinning()
        return model

    def _start_pinning(self) -> None:
        """Reads what models pin, once nothing can be inherited whose place that would take."""
        if self._inheritance.models:
            return
        for model in self.models.values():
            if model.pins and model not in self._pinning:
                self._pinning[model] = asyncio.create_task(self._keep(model))

    async def set_limits(self, name: str, min_bytes: int, max_bytes: int | None) -> HostedModel:
        """Changes a loaded model's minimum and maximum; its pins stay.

        Above a lowered maximum it gives up at once what nobody uses. Raises
        :class:`CapacityError`, :class:`ConfigError`, :class:`NotFoundError`.
        """
        async with self._admission:
            model = self.model(name)
            limits = replace(model.limits, min_bytes=min_bytes, max_bytes=max_bytes)
            self.budget.check_model(name, model.manifest, limits, model.pinned.num_bytes)
            model.limits = limits
            self.slots.trim(model)
        log("limits changed", model=name, min_bytes=min_bytes, max_bytes=max_bytes or "none")
        return model

    async def _begin(
        self,
        name: str,
        path: Path,
        pack: Fingerprinted,
        opened: OpenPack,
        origin: Origin,
        limits: ModelLimits,
        disk_io: DiskIo | None,
    ) -> HostedModel:
        """The model without any record, its directory in the fd store."""
        description = Description(
            name=name,
            pack=str(path),
            fingerprint=pack.fingerprint,
            arena=self.arena.trailer.id,
            origin=origin,
            limits=limits,
            disk_io=disk_io,
        )
        memory = new_directory(pack.manifest.num_experts, description)
        if self._fd_store.is_full:
            self._warn(f"{name!r} does not outlive a restart: raise FileDescriptorStoreMax.")
        self._stored_as[name] = await self._fd_store.put_directory(memory)
        return self._host(name, path, pack, opened, memory, limits)

    async def _inherit(
        self, name: str, path: Path, pack: Fingerprinted, opened: OpenPack, limits: ModelLimits
    ) -> HostedModel | None:
        """The model as an earlier daemon left it, its records verified; None if it left none."""
        found = await self._inheritance.claim(self._fd_store, name, path, pack)
        if found is None:
            return None
        model = self._host(name, path, pack, opened, found.memory, limits)
        await adopt_records(model, self.arena, self.slots.extents)
        self._stored_as[name] = found.stored_as
        return model

    def _host(
        self,
        name: str,
        path: Path,
        pack: Fingerprinted,
        opened: OpenPack,
        memory: SharedMemory,
        limits: ModelLimits,
    ) -> HostedModel:
        policy = self.config.policy
        return HostedModel(name, path, pack, opened.files, memory, policy, limits, opened.disk)

    async def unload_model(self, name: str) -> int:
        """Drops a model once its records are unused; returns the bytes given back.

        Sessions that are still in a step get ``stall_seconds`` to leave it.
        """
        model = self.model(name)
        if model.state is ModelState.UNLOADING:
            raise PreconditionError(f"model {name!r} is being unloaded already.")
        model.state = ModelState.UNLOADING
        # To its end, even if the caller goes away: a model half dropped serves nobody.
        return await self._finish(self._unload(model))

    # Sessions

    def attach(
        self, role: Role, model_name: str, connection: Connection, pid: int, uid: int
    ) -> HostedSession:
        """A new session. Raises :class:`NotFoundError`, :class:`CapacityError`."""
        # Not the administrator, who may have to make room.
        if len(self.sessions) >= self.config.max_sessions and role is not Role.ADMIN:
            raise CapacityError(
                f"{len(self.sessions)} sessions are attached, the most that max_sessions allows; "
                "detach one or raise it.",
                requested=len(self.sessions) + 1,
                available=self.config.max_sessions,
                unit="sessions",
            )
        of_uid = sum(session.uid == uid for session in self.sessions.values())
        if of_uid >= self.config.max_sessions_per_uid and role is not Role.ADMIN:
            raise CapacityError(
                f"{of_uid} sessions of uid {uid} are attached, the most that "
                "max_sessions_per_uid allows; detach one or raise it.",
                requested=of_uid + 1,
                available=self.config.max_sessions_per_uid,
                unit="sessions",
            )
        model = None
        if role is Role.WORKER:
            model = self.model(model_name)
            if model.state is not ModelState.SERVING:
                raise PreconditionError(f"model {model_name!r} is being unloaded.")
        token = secrets.token_hex(16)
        kept = self.quotas.kept_by(uid)
        session = HostedSession(next(self._numbers), token, role, pid, uid, connection, model, kept)
        self.sessions[token] = session
        return session

    def detach(self, session: HostedSession) -> None:
        """Ends a session and frees what it held. Twice is harmless.

        Its process may live on and be reading, so it is told first that bytes may change.
        """
        self.records.drop_hint(session)
        session.revoke()
        self.sessions.pop(session.token, None)
        session.close()

    def session(self, token: str, incarnation: str) -> HostedSession:
        """The session of a call.

        Raises :class:`UnauthenticatedError`, :class:`IncarnationError`.
        """
        session = self.sessions.get(token)
        if session is not None:
            session.has_called = True
            return session
        if incarnation and incarnation != self.incarnation:
            raise IncarnationError(
                "expertd was restarted since this session attached; attach again."
            )
        raise UnauthenticatedError(
            "no session has this token: attach first, or again if the session has ended."
        )

    async def close(self) -> None:
        """Ends all sessions, waits for reads in flight, gives the models back."""
        for task in (*self._tasks, *self._pinning.values()):
            task.cancel()
        await self.records.close()
        await self._scrubber.close()
        await self.slots.close()
        for session in self.sessions.values():
            session.close()  # not revoked: nobody reuses what workers still have mapped
        self.sessions.clear()
        await asyncio.to_thread(self.loader.close)
        await asyncio.sleep(0)  # lets the last reads' callbacks run
        for model in self.models.values():
            await self.tables.close(model.tables)
            model.close(self.slots.free)
        self.models.clear()

    async def _keep(self, model: HostedModel) -> None:
        try:
            await self.records.keep(model)
        except Exception:  # a bug of ours; the pins count, and are read when they are used
            log_failure("reading pinned records")

    async def _unload(self, model: HostedModel) -> int:
        released = model.resident_bytes
        if (pinning := self._pinning.pop(model, None)) is not None:
            pinning.cancel()
        deadline = self._loop.time() + self.config.stall_seconds
        async with self.slots.turn():  # who was inside has its room, who comes later is refused
            for session in self._sessions_of(model):
                self.records.drop_hint(session)
                session.unpin(session.pins.copy())
            model.unpin(model.pins.copy())
        while model.is_in_use:
            self.slots.refresh()
            if len(idle := model.evictable()):
                model.evict(idle.tolist())
            late = self._loop.time() > deadline
            for session in self._sessions_of(model):
                if late:
                    self._cut_off(session)
                else:
                    session.nudge()
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        for session in self._sessions_of(model):
            self.detach(session)
        # Only now: while a session may read, a next daemon must know of what.
        await self._fd_store.remove(self._stored_as.pop(model.name))
        await asyncio.to_thread(self._drop_page_cache, model)
        await self.tables.close(model.tables)
        del self.models[model.name]
        model.close(self.slots.free)
        log("model unloaded", model=model.name)
        return released

    def _drop_page_cache(self, model: HostedModel) -> None:
        for file in model.files:
            self.page_cache.remove(file, drop=True)

    async def _finish(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Does it in a task of its own, which goes on if the caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _cut_off(self, session: HostedSession) -> None:
        """Ends a session that stands still while others wait."""
        self.num_cut_off += 1
        log_warning("session cut off", session=session.id, pid=session.pid, lag=session.epoch_lag)
        self.detach(session)

    def _sessions_of(self, model: HostedModel) -> list[HostedSession]:
        return [
            session
            for session in self.sessions.values()
            if session.is_worker and session.model is model
        ]

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)
            log_warning("degraded", text=warning)


def _room_for_tables(config: ServeConfig, arena: Arena, more: Iterable[Path]) -> TableRoom:
    """For the models of the settings, and the packs ``more``; what is wrong is told on loading."""
    manifests: list[Manifest] = []
    for path in [*(model.path for model in config.models.values()), *more]:
        with suppress(PackError):
            manifests.append(read_manifest(path).manifest)
    num_bytes = room_for(config.table_ram_bytes, arena.num_bytes, manifests)
    with_tables = sum(bool(manifest.tables) for manifest in manifests)
    return TableRoom(arena, num_bytes, with_tables)
