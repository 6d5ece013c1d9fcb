from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import PAGE, make_pack

RECORD_BYTES = 2 * PAGE
STALL_SECONDS = 0.5


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 8 experts, two a token."""
    return make_pack(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little patience."""
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(f"stall_seconds = {STALL_SECONDS}\ndrain_seconds = 0.5\nmax_sessions = 24\n")
    return path


@pytest.fixture(scope="session")
def roomy(pack: Path, settings: Path) -> Iterator[Daemon]:
    """A daemon that holds the whole model."""
    with serving({"m": pack}, ram=64 * RECORD_BYTES, config=settings) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def tight(pack: Path, settings: Path) -> Iterator[Daemon]:
    """A daemon with room for six records, one token's working set."""
    with serving({"m": pack}, ram=6 * RECORD_BYTES, config=settings) as daemon:
        yield daemon
