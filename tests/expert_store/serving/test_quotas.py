"""Quotas as a client meets them: it goes in waves that fit, by itself."""

import os
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_testing.daemon import serving
from expertd_testing.handmade import record
from expertstore.errors import CapacityError
from tests.expert_store.serving.conftest import RECORD_BYTES


def test_waves_adapt_to_the_quota(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[quotas]\n{os.getuid()} = {4 * RECORD_BYTES}\n")
    with (
        serving({"m": pack}, ram=16 * RECORD_BYTES, config=config) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as session,
        store.attach("m") as pinner,
        Client(daemon.socket) as client,
    ):
        assert session.model.max_fetch_records == 16
        assert pinner.pin([(2, 0)]) == 1
        with pytest.raises(CapacityError, match=f"quota of uid {os.getuid()} is 32.0 KiB"):
            session.acquire(0, range(8))
        sizes = []
        for lease in session.waves(1, range(8)):
            with lease:
                sizes.append(len(lease.experts))
                for expert, view in zip(lease.experts, lease.views, strict=True):
                    assert view == record(1, expert)
                told = {row["id"]: row for row in client.stats()["sessions"]}
                assert told[session.id]["kept_bytes"] == 3 * RECORD_BYTES or len(sizes) == 3
                assert told[pinner.id]["kept_bytes"] == RECORD_BYTES
                assert told[session.id]["uid_kept_bytes"] <= told[session.id]["quota_bytes"]
        assert sizes == [3, 3, 2]
        assert told[session.id]["quota_bytes"] == 4 * RECORD_BYTES
