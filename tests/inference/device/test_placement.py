"""How many experts a device keeps: what it has, less what else it needs."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_inference.device.placement import MAX_RESERVE_BYTES, RESERVE_SHARE, cache_size
from expertd_inference.settings import DeviceSettings
from expertstore.errors import InvalidInputError
from expertstore.pack.manifest import Manifest, read_manifest


@pytest.fixture(scope="module")
def manifest(packed: Callable[..., Any]) -> Manifest:
    return read_manifest(packed("example")).manifest


@given(free=st.integers(0, 1 << 37), keys=st.integers(0, 1 << 34), guessed=st.integers(0, 3))
def test_an_automatic_cache_leaves_room(
    manifest: Manifest, free: int, keys: int, guessed: int
) -> None:
    settings = DeviceSettings(device="cuda", speculate_layers=guessed)
    layers = [layer.layer for layer in manifest.layers]
    experts = sum(layer.num_experts for layer in manifest.layers)
    left = free - keys - min(int(free * RESERVE_SHARE), MAX_RESERVE_BYTES)
    try:
        size = cache_size(manifest, layers, settings, free_bytes=free, name="d", kv_bytes=keys)
    except InvalidInputError:
        least = settings.num_staging + manifest.layers[0].experts_per_token
        assert left < least * manifest.max_record_bytes
    else:
        assert size.num_bytes <= left
        # And no more room than one slot is left over, unless all experts have one.
        assert size.num_slots == experts or left - size.num_bytes < size.slot_bytes


def test_what_is_too_little_is_said(manifest: Manifest) -> None:
    settings = DeviceSettings(device="cuda")
    with pytest.raises(InvalidInputError, match=r"of which 3\.0 MiB are for keys"):
        cache_size(manifest, [0], settings, free_bytes=4 << 20, name="d", kv_bytes=3 << 20)


def test_a_size_that_was_named_is_taken(manifest: Manifest) -> None:
    layers = [layer.layer for layer in manifest.layers]
    named = 20 * manifest.max_record_bytes
    settings = DeviceSettings(device="cuda", cache_bytes=named)
    size = cache_size(manifest, layers, settings, free_bytes=0, name="d", kv_bytes=1 << 40)
    assert size.num_bytes == named
