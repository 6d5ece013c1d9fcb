"""The metrics of a real daemon, as Prometheus and ``promtool`` see them."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.raw_worker import Caller
from expertd_testing.watching import eventually, expertd
from expertstore.errors import NotFoundError
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES
from tests.expert_store.serving.scraping import ANY, scrape, values
from tests.promtool import check, needs_promtool


@needs_promtool
def test_what_workers_do_is_seen(pack: Path, settings: Path) -> None:
    with serving({"m": pack}, ram=6 * RECORD_BYTES, config=settings, arguments=ANY) as daemon:
        with Client(daemon.socket) as store, store.attach("m") as session:
            for layer in (0, 1, 2, 2):
                session.acquire(layer, [0, 1, 2]).release()
            with pytest.raises(NotFoundError):
                store.attach("x")
            text = scrape(daemon)
            seen = values(text)
            assert seen["expertd_sessions", "m", "worker"] == 1
        assert seen["expertd_accesses_total", "host_hit", "m"] == 3
        assert seen["expertd_accesses_total", "nvme_miss", "m"] == 9
        assert seen["expertd_evictions_total", "m"] == 3
        assert seen["expertd_read_bytes_total", "m"] == 9 * RECORD_BYTES
        assert seen["expertd_fetch_seconds_count", "m"] == 3
        assert 0 < seen["expertd_fetch_seconds_sum", "m"] < 10
        assert seen["expertd_record_read_seconds_count", "m"] == 9
        assert seen["expertd_refusals_total", "NOT_FOUND", "attach"] == 1
        assert seen["expertd_refusals_total", "NOT_FOUND", "rpc"] == 0
        with Caller(daemon.socket) as caller, pytest.raises(NotFoundError):
            caller.call("GetModel", pb.GetModelRequest(name="x"))
        after = values(scrape(daemon))
        assert after["expertd_refusals_total", "NOT_FOUND", "rpc"] == 1
        assert after["expertd_sessions", "m", "worker"] == 0
        eventually(lambda: values(scrape(daemon))["expertd_event_loop_lag_seconds_count",] > 0)
        assert check("check", "metrics", text=text) == ""


def test_a_fleet_of_scrapes(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB", arguments=ANY) as daemon:
        with Client(daemon.socket) as store, store.attach("m") as session:
            with ThreadPoolExecutor(8) as pool:
                scrapes = [pool.submit(scrape, daemon) for _ in range(100)]
                for _ in range(20):
                    for layer in range(3):
                        session.acquire(layer, range(8)).release()
                assert all("expertd_build_info" in each.result() for each in scrapes)
            assert values(scrape(daemon))["expertd_accesses_total", "host_hit", "m"] == 57 * 8
        assert daemon.terminate() == 0


def test_off_unless_asked_for(roomy: Daemon) -> None:
    assert "metrics" not in roomy.stdout
    inodes = {
        target.removeprefix("socket:[").removesuffix("]")
        for each in Path(f"/proc/{roomy.pid}/fd").iterdir()
        if (target := str(each.readlink())).startswith("socket:")
    }
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert not [row for row in rows if row[9] in inodes]


def test_in_the_settings(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('metrics = "localhost:0"\n')
    with serving({"m": pack}, ram="1MiB", config=config) as daemon:
        assert "expertd_build_info" in scrape(daemon)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("0.0.0.0:9464", "can be reached from other hosts"),
        ("9464", "write it like 127.0.0.1:9464"),
    ],
)
def test_refused_addresses(address: str, says: str, tmp_path: Path) -> None:
    done = expertd("serve", "--socket", tmp_path / "s", "--ram", "1MiB", "--metrics", address)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert says in done.stderr
    assert done.stderr.startswith("expertd: --metrics: ")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = expertd("serve", "--socket", tmp_path / "s", "--ram", "1MiB", "--metrics", address)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert f"metrics cannot be served at {address}: Address already in use" in done.stderr
    assert not list((tmp_path / "s").glob("*.sock"))
