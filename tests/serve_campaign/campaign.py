"""The campaign against a server: engines, daemons and servers die while clients read.

All of the time clients ask, and each whole answer is compared with the one that an undisturbed
server gave. Between the parts nobody asks, and what the server holds is compared with what it held
after the first part.
"""

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2

from expertd_client import Client, ExpertdError
from expertd_testing.server import Server
from tests.campaign.process import exists
from tests.campaign.supervisor import Supervisor
from tests.serve_campaign.asking import MODEL, AnswerError, ask, make_requests
from tests.serve_campaign.batch import begin_batch, expected_of_batch, wrong_in_batch
from tests.serve_campaign.clients import SETTLE_SECONDS, Clients
from tests.serve_campaign.report import Plan, Report
from tests.serve_campaign.stock import Stock, take_stock

KV_TOKENS = 1280
"""Less than the clients' answers take together: some are preempted."""
REATTACH_SECONDS = 60
WARM_KILLS = 5
"""Engines that die before the server's holdings are compared with anything."""
MAX_HEAP_GROWTH_BYTES = 16 << 20
"""Of the server, over a whole part. A session of 10 KiB a request left behind would be more."""
MAX_THREAD_GROWTH = 8
"""The pools for blocking calls grow once."""


class Campaign:
    """One run. ``directory`` has a pack and a chat template, and is for temporary files."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        pack: Path,
        supervisor: Supervisor,
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.report = Report(plan)
        self._plan, self._directory, self._pack = plan, directory, pack
        self._supervisor, self._progress = supervisor, progress
        self._chance = random.Random(plan.seed)
        self._temporary = directory / "t"
        self._temporary.mkdir()
        # All that a server and its engines leave is seen there.
        os.environ["TMPDIR"] = str(self._temporary)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._server = self._new_server()
        url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._url = url
        self._killed: set[int] = set()
        self._requests = make_requests(plan.seed)
        self._clients = Clients(url, self._requests, self.report, plan.seed)

    async def run(self) -> Report:
        """All of it."""
        began, report = time.monotonic(), self.report
        try:
            await asyncio.to_thread(self._server.wait_ready)
            await self._clients.learn()
            parts = (
                ("a few engines died", self._kill_engines, WARM_KILLS),
                ("engines died", self._kill_engines, self._plan.engine_kills - WARM_KILLS),
                ("the model was unloaded and loaded", self._reload, self._plan.reloads),
                ("daemons died", self._kill_daemons, self._plan.daemon_kills),
                ("what forks engines died", self._kill_forkers, self._plan.fork_server_kills),
            )
            for name, part, times in parts:
                async with self._clients.at_work(self._plan.clients):
                    await part(times)
                await self._take_stock(name)
                self._compare_stocks(name)
                if report.problems:
                    return report
            report.preemptions = await self._preemptions()
            if not report.preemptions:
                report.problem("no sequence was preempted: the memory for keys was never full")
            async with self._clients.at_work(self._plan.clients):
                await self._succeed(self._plan.successions)
            await self._kill_servers(self._plan.server_kills)
            await self._end()
        except (ExpertdError, AnswerError, RuntimeError) as error:
            report.problem(f"{type(error).__name__}: {error}")
        finally:
            report.seconds = time.monotonic() - began
            for problem in self._supervisor.problems():
                report.problem(problem)
            if "Traceback" in self._server.log:
                report.problem(f"the server logged:\n{self._server.log[-4000:]}")
            await asyncio.to_thread(self._server.close)
            self._listening.close()
        return report

    # What happens

    async def _kill_engines(self, times: int) -> None:
        moments = (self._any_moment, self._after_a_token, self._in_a_prompt, self._at_its_start)
        starts = 0
        for _ in range(times):
            moment = self._chance.choice(moments)
            # An engine that cannot start for REATTACH_SECONDS is given up, rightly.
            starts = starts + 1 if moment == self._at_its_start else 0
            await (self._any_moment if starts > 3 else moment)()
            self._kill_engine()
            self._happened("engines")
            if self.report.problems:
                return
        await self._pause()

    async def _any_moment(self) -> None:
        await self._pause()
        await asyncio.sleep(self._chance.uniform(0, 2))

    async def _after_a_token(self) -> None:
        await self._pause()
        await self._clients.next(self._clients.came)

    async def _in_a_prompt(self) -> None:
        await self._pause()
        await self._clients.next(self._clients.asking)
        await asyncio.sleep(self._chance.uniform(0, 0.05))

    async def _at_its_start(self) -> None:
        await self._until(lambda: bool(self._engines()), "no engine starts")
        await asyncio.sleep(self._chance.uniform(0, 1.5))

    async def _pause(self) -> None:
        """Until a client gets on after the last kill."""
        began = time.monotonic()
        await self._clients.next(self._clients.came)
        self.report.pause_seconds.append(time.monotonic() - began)

    def _kill_engine(self) -> None:
        for pid in self._engines():
            self._killed.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _engines(self) -> list[int]:
        return [pid for pid in self._server.engines if pid not in self._killed and exists(pid)]

    async def _kill_daemons(self, times: int) -> None:
        for _ in range(times):
            await self._any_moment()
            restarting = asyncio.to_thread(self._supervisor.restart, self._chance)
            if self._chance.random() < 0.3:  # both at once
                self._kill_engine()
            await restarting
            self._happened("daemons")
            if self.report.problems:
                return
        await self._pause()

    async def _reload(self, times: int) -> None:
        for _ in range(times):
            await self._any_moment()
            self._clients.loaded.clear()
            await asyncio.to_thread(self._unload_and_load)
            self._clients.loaded.set()
            self._happened("unloaded")
        await self._pause()

    def _unload_and_load(self) -> None:
        with Client(self._supervisor.directory) as store:
            store.unload_model(MODEL)
            time.sleep(self._chance.uniform(0, 2))
            store.load_model(MODEL, self._pack)

    async def _kill_forkers(self, times: int) -> None:
        """Engines are forked from one process; without it, from a new one."""
        for _ in range(times):
            await self._any_moment()
            for pid in {_parent(engine) for engine in self._engines()}:
                os.kill(pid, signal.SIGKILL)
            if self._chance.random() < 0.7:
                await asyncio.sleep(self._chance.uniform(0, 0.2))
            self._kill_orphans()
            self._happened("fork servers")
        await self._pause()

    def _kill_orphans(self) -> None:
        """Engines whose parent died are nobody's children now."""
        with Client(self._supervisor.directory) as store:
            sessions = store.stats()["sessions"]
        for session in sessions:
            if session["model"]:
                with suppress(ProcessLookupError):
                    os.kill(session["pid"], signal.SIGKILL)

    async def _succeed(self, times: int) -> None:
        """The next server listens on the same socket; the one before ends in order."""
        for _ in range(times):
            await self._any_moment()
            before, self._server = self._server, self._new_server()
            await asyncio.to_thread(self._server.wait_ready)
            before.signal(signal.SIGTERM)
            code = await asyncio.to_thread(before.wait)
            if code:
                self.report.problem(f"a server ended with {code}: {before.log[-2000:]}")
            left = [pid for pid in before.descendants if exists(pid)]
            if left:
                self.report.problem(f"a server left processes {left}")
            await asyncio.to_thread(before.close)
            self._happened("successions")

    async def _kill_servers(self, times: int) -> None:
        """Each in the middle of a batch, which the next one goes on with."""
        expected = await expected_of_batch(self._url, self._requests)
        batch = await begin_batch(self._url, self._requests)
        for _ in range(times):
            await self._until(lambda: bool(self._engines()), "no engine starts")
            await asyncio.sleep(self._chance.uniform(0, 1.5))
            processes = self._server.descendants
            self._server.signal(signal.SIGKILL)
            await asyncio.to_thread(self._server.wait)
            await self._until(
                lambda: not any(map(exists, processes)),  # noqa: B023 - waited for
                f"processes {processes} outlive their server",
            )
            await asyncio.to_thread(self._server.close)
            self._server = self._new_server()
            await asyncio.to_thread(self._server.wait_ready)
            self._happened("servers")
        for problem in await wrong_in_batch(self._url, batch, expected):
            self.report.problem(problem)

    async def _end(self) -> None:
        """In order: nothing of it stays."""
        processes = self._server.descendants
        self._server.signal(signal.SIGTERM)
        if code := await asyncio.to_thread(self._server.wait):
            self.report.problem(f"the last server ended with {code}")
        await self._until(
            lambda: not any(map(exists, processes)), f"processes {processes} outlive their server"
        )
        await self._until(lambda: not self._sessions(), "sessions outlive their server")

    # What is looked at

    async def _take_stock(self, name: str) -> None:
        if "the model" in name or "daemons" in name:
            await ask(self._url, self._requests[0])
        await self._until(lambda: len(self._engines()) == 1, "there is not one engine")
        await self._until(lambda: len(self._sessions()) == 1, "there is not one session")
        stock = self._stock()
        deadline = time.monotonic() + 10
        # The daemon, too, closes what its clients have closed when it comes to that.
        while self._left(name, stock) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            stock = self._stock()
        self.report.stocks[name] = stock

    def _left(self, name: str, stock: Stock) -> dict[str, tuple[int, int]]:
        """What there is more of than after the first kills; the daemon may be another later."""
        first = self.report.stocks.get("a few engines died")
        if first is None:
            return {}
        left = stock.left_since(first)
        if name == "engines died":
            left |= stock.left_at_the_daemon(first)
        return left

    def _stock(self) -> Stock:
        return take_stock(
            self._server, self._supervisor.pid, self._supervisor.directory, self._temporary
        )

    def _compare_stocks(self, name: str) -> None:
        stocks = self.report.stocks
        first, last = stocks["a few engines died"], stocks[name]
        left = self._left(name, last)
        more = last.server.num_threads - first.server.num_threads
        if more <= MAX_THREAD_GROWTH:
            left.pop("threads of the server", None)
        for what, (before, after) in left.items():
            self.report.problem(f"after {name}: {what} were {before}, are {after}")
        growth = last.server.anonymous_bytes - first.server.anonymous_bytes
        if growth > MAX_HEAP_GROWTH_BYTES:
            self.report.problem(f"after {name}: the server's heap grew by {growth} bytes")

    def _sessions(self) -> list[int]:
        with (
            suppress(ExpertdError),
            Client(self._supervisor.directory, timeout_seconds=10) as store,
        ):
            return [each["pid"] for each in store.stats()["sessions"] if each["model"]]
        return []

    async def _preemptions(self) -> int:
        async with httpx2.AsyncClient(trust_env=False) as client:
            metrics = (await client.get(f"{self._url}/metrics")).text
        series = [line.rpartition(" ")[0] for line in metrics.splitlines() if line[:1] != "#"]
        if len({*series}) < len(series):
            self.report.problem("/metrics has a series twice")
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions")]
        return int(sum(float(line.rpartition(" ")[2]) for line in lines))

    async def _until(self, true: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while not await asyncio.to_thread(true):
            if time.monotonic() > deadline:
                self.report.problem(f"after {SETTLE_SECONDS:g} s, {otherwise}")
                return
            await asyncio.sleep(0.02)

    def _happened(self, what: str) -> None:
        self.report.count(what)
        text = f"{what}, {self.report.answers} answers compared"
        self._progress(self.report.done, self._plan.total, text)

    def _new_server(self) -> Server:
        arguments = ["--socket", str(self._supervisor.directory), "--exact", "--preload", MODEL]
        arguments += ["--kv-tokens", str(KV_TOKENS), "--max-sequences", "16"]
        arguments += ["--reattach-seconds", str(REATTACH_SECONDS), "--threads", "1"]
        arguments += ["--chat-template", str(self._directory / "chat.jinja")]
        arguments += ["--state", str(self._directory / "state")]
        return Server(arguments, self._listening)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
