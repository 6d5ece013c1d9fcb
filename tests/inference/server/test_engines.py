"""Engines that end: clients see a pause, and no error and no other text."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.server import Server, serving_http
from tests.inference.conftest import Make
from tests.inference.server.events import events_of, text_of

CLIENTS = 4
TOKENS = 300


def test_a_killed_engine_costs_a_pause(server: Server) -> None:
    expected = _all(server)
    with _meanwhile(lambda: _kill(server, 3)) as killed:
        found = _all(server, until=killed)
    assert found == expected
    assert "another one goes on with" in server.log


def test_a_client_that_leaves_ends_its_sequence(server: Server) -> None:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": "def", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        # The engine of one sequence at a time would not answer before it is through.
        began = time.monotonic()
        client.post("/v1/completions", json={"prompt": "def", "max_tokens": 1})
        assert time.monotonic() - began < HANG_SECONDS


@pytest.fixture
def daemon(packed: Make) -> Iterator[Daemon]:
    with serving({"example": packed("example", "4bit"), "other": packed("mixtral")}) as started:
        yield started


def test_a_daemon_s_models_and_what_becomes_of_them(daemon: Daemon, packed: Make) -> None:
    """Loaded on the first request, idle, unloaded and loaded again, and the daemon restarted."""
    arguments = ["--socket", daemon.socket, "--exact", "--kv-tokens", "16384"]
    with serving_http(*arguments, "--idle-seconds", "1") as server:
        assert server.greeting.startswith("serving example, other when asked for, listening on")
        assert not server.engines
        expected = _all(server)
        assert len(server.engines) == 1
        _until(lambda: not server.engines)
        with Client(daemon.socket) as store:
            _all(server)
            with _meanwhile(lambda: _reload(store, packed("example", "4bit"))) as done:
                assert _all(server, until=done) == expected
        with ExitStack() as stack:
            successor = serving({"example": packed("example", "4bit")}, socket=daemon.socket)
            with _meanwhile(lambda: _replace(daemon, stack, successor)) as done:
                assert _all(server, until=done) == expected


def test_a_new_server_on_the_same_socket_refuses_nobody(daemon: Daemon) -> None:
    """The one before it answers what it began, and leaves nothing behind."""
    arguments = ["--socket", daemon.socket, "--preload", "example", "--exact"]
    with (
        socket.create_server(("127.0.0.1", 0), backlog=100) as listening,
        ThreadPoolExecutor(1) as pool,
    ):
        done = threading.Event()
        with serving_http(*arguments, passed=listening) as first, ExitStack() as stack:
            assert first.url == f"http://127.0.0.1:{listening.getsockname()[1]}"
            expected = _all(first)
            begun = [stack.enter_context(_begun(first, number)) for number in range(CLIENTS)]
            found = pool.submit(_all, first, done)
            started = first.descendants
            first.signal(signal.SIGTERM)
            assert [text_of(events_of(response)) for response in begun] == expected
            assert first.wait() == 0
            _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
        with serving_http(*arguments, passed=listening):
            done.set()
            assert found.result() == expected


def _all(server: Server, until: threading.Event | None = None) -> list[str]:
    """What as many clients get at once; again and again, the last time after ``until``."""
    while True:
        last = until is None or until.is_set()
        with ThreadPoolExecutor(CLIENTS) as pool:
            texts = [*pool.map(lambda number: _text(server, number), range(CLIENTS))]
        if last:
            return texts


def _text(server: Server, number: int) -> str:
    with _begun(server, number) as response:
        return text_of(events_of(response))


@contextmanager
def _begun(server: Server, number: int) -> Iterator[httpx2.Response]:
    """An answer whose head has come."""
    body = {
        "model": "example",
        "prompt": f"def function_{number}(",
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        httpx2.Client(base_url=server.url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        yield response


class _meanwhile:  # noqa: N801 - a with statement's word
    """Does something in a thread while the block runs; its event is set once it is done."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: (work(), self._done.set()))

    def __enter__(self) -> threading.Event:
        self._thread.start()
        return self._done

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        assert self._done.is_set()


def _kill(server: Server, times: int) -> None:
    for _ in range(times):
        _until(lambda: bool(server.engines))
        time.sleep(0.5)
        for pid in server.engines:
            os.kill(pid, signal.SIGKILL)


def _reload(store: Client, pack: Path) -> None:
    time.sleep(0.3)
    store.unload_model("example")
    time.sleep(0.3)
    store.load_model("example", pack)


def _replace(daemon: Daemon, stack: ExitStack, successor: AbstractContextManager[Daemon]) -> None:
    time.sleep(0.3)
    daemon.kill()
    stack.enter_context(successor)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
