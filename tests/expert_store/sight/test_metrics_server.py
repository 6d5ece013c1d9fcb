"""The metrics' HTTP door, before a loop that answers, hangs, fails or is gone."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric

from expertd.settings.loopback import LoopbackAddress
from expertd.sight import metrics_server
from expertd.sight.metrics_server import MAX_CONNECTIONS, Exposition, MetricsServer
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import ConfigError

ANY = LoopbackAddress("127.0.0.1", 0)


class Source:
    """What is collected, and how it goes wrong."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.count = 0

    def collect(self) -> Sequence[Metric]:
        self.count += 1
        self.gate.wait(20)
        if self.error:
            raise self.error
        return [GaugeMetricFamily("thing", "A thing.", value=self.count)]


@contextmanager
def looping() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def serving(source: Source, address: LoopbackAddress = ANY) -> Iterator[MetricsServer]:
    with looping() as loop:
        server = MetricsServer(address, Exposition(source.collect, loop))
        try:
            yield server
        finally:
            source.gate.set()
            server.close()


def get(
    server: MetricsServer, path: str = "/metrics", method: str = "GET"
) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def test_answers() -> None:
    with serving(Source()) as server:
        status, text, headers = get(server)
        assert status == 200
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "# HELP thing A thing.\n# TYPE thing gauge\nthing 1.0\n" in text
        assert "process_cpu_seconds_total" in text
        assert get(server, method="HEAD")[:2] == (200, "")
        assert get(server, "/")[:2] == (404, "expertd's metrics are at /metrics\n")
        assert get(server, method="POST")[0] == 501


def test_ipv6() -> None:
    with serving(Source(), LoopbackAddress("::1", 0)) as server:
        assert get(server)[0] == 200


def test_an_address_that_is_taken() -> None:
    says = r"127\.0\.0\.1:\d+: Address already in use; give"
    with serving(Source()) as server, looping() as loop, pytest.raises(ConfigError, match=says):
        MetricsServer(server.address, Exposition(Source().collect, loop))


def test_a_loop_that_hangs_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "SNAPSHOT_SECONDS", 0.2)
    source = Source()
    with serving(source) as server:
        source.gate.clear()
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            answers = [each.result() for each in [pool.submit(get, server) for _ in range(4)]]
        assert {answer[0] for answer in answers} == {503}
        assert time.monotonic() - began < HANG_SECONDS
        assert [get(server)[0] for _ in range(3)] == [503] * 3
        source.gate.set()
        assert get(server)[0] == 200, "it comes back"
        assert source.count == 2, "what nobody waits for any more is not done"


def test_a_loop_that_has_ended_is_a_503() -> None:
    with looping() as loop:
        server = MetricsServer(ANY, Exposition(Source().collect, loop))
    try:
        assert get(server)[0] == 503
    finally:
        server.close()


def test_a_bug_of_ours_is_a_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    source.error = ZeroDivisionError("secret")
    with caplog.at_level(logging.INFO, "expertd"), serving(source) as server:
        status, text, _ = get(server)
        assert (status, text) == (500, "expertd's log says what failed\n")
        assert "secret" in caplog.text
        source.error = None
        assert get(server)[0] == 200


def test_scrapes_at_once_share_snapshots_and_none_is_old() -> None:
    source = Source()
    with serving(source) as server:
        source.gate.clear()
        with ThreadPoolExecutor(12) as pool:
            first = pool.submit(get, server)
            while not source.count:
                time.sleep(0.001)
            others = [pool.submit(get, server) for _ in range(10)]
            time.sleep(1)  # for all of them to have asked, on a busy machine too
            source.gate.set()
            assert "thing 1.0" in first.result()[1]
            # What was begun before they asked would be too old for them.
            assert all("thing 2.0" in other.result()[1] for other in others)
        assert source.count == 2
        assert "thing 3.0" in get(server)[1]


def test_clients_that_say_nothing_are_few_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server._Handler, "timeout", 3.0)
    with serving(Source()) as server:
        silent = [socket.create_connection(server.address) for _ in range(MAX_CONNECTIONS)]
        for each in silent:
            each.settimeout(20)
        deadline = time.monotonic() + HANG_SECONDS
        while server._server._free._value:
            assert time.monotonic() < deadline, "they are not all being waited for"
            time.sleep(0.01)
        with pytest.raises((ConnectionError, HTTPException)):  # one more than are served at once
            get(server)
        assert all(each.recv(1) == b"" for each in silent)
        for each in silent:
            each.close()
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            try:
                assert get(server)[0] == 200
                break
            except (ConnectionError, HTTPException):
                assert time.monotonic() < deadline
                time.sleep(0.05)
