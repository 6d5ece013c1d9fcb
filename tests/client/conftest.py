from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import PAGE, make_pack
from tests.client.shared_memory import SharedMemory, shared_memory

RECORD_BYTES = 2 * PAGE


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with shared_memory() as memory:
        yield memory


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 8 experts."""
    return make_pack(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture(scope="module")
def roomy(pack: Path) -> Iterator[Daemon]:
    """A daemon that holds the whole model."""
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def tight(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with room for six records, one token's working set, and little patience."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text("stall_seconds = 1.0\n")
    with serving({"m": pack}, ram=6 * RECORD_BYTES, config=config) as daemon:
        yield daemon


@pytest.fixture
def mortal(pack: Path) -> Iterator[Daemon]:
    """A daemon of this test's own, to be killed."""
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon:
        yield daemon


@pytest.fixture
def store(roomy: Daemon) -> Iterator[Client]:
    with Client(roomy.socket, timeout_seconds=10) as client:
        yield client
