"""pack.json: what the daemon loads of a bent one serves right bytes or says that they are lost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_client import Client
from expertd_testing.handmade import record
from expertstore.errors import (
    CapacityError,
    InvalidInputError,
    NotFoundError,
    PackError,
    RecordLostError,
)
from tests.fuzz.budget import bounded
from tests.fuzz.target import Culprit, Target, fuzzed

# What may be wrong with a pack, or with asking for an expert that it does not have.
REFUSALS = (PackError, CapacityError, InvalidInputError)
LOSSES = (RecordLostError, NotFoundError, CapacityError)

NUMBERS = st.sampled_from([-1, 0, 1, 2, 7, 8, 4095, 4096, 8192, 1 << 20, 1 << 32, 1 << 48, 1 << 70])
VALUES = st.one_of(
    NUMBERS,
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    st.lists(NUMBERS, max_size=9),
    st.sampled_from(["\ud800", "../x", "/etc/passwd", "0" * 16, "trunk.safetensors", "BF16"]),
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Culprit]]:
    with fuzzed(tmp_path_factory.mktemp("fuzz")) as scene:
        shutil.copytree(scene[0].pack, scene[0].pack.parent / "bent")
        yield scene


@st.composite
def edits(draw: st.DrawFn, sound: bytes) -> bytes:
    """One to three values replaced, exchanged or removed; sometimes bytes as well."""
    tree = json.loads(sound)
    for _ in range(draw(st.integers(0, 3))):
        place, key = tree, draw(st.sampled_from(sorted(tree)))
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 4)):
            place = place[key]
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if kind == "remove":
            del place[key]
            if not tree:
                break
        elif kind == "repeat" and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = draw(VALUES)
    data = bytearray(json.dumps(tree).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@bounded(150)
@given(data=st.data())
def test_a_bent_manifest(data: st.DataObject, scene: tuple[Target, Culprit]) -> None:
    target, _ = scene
    bent = target.pack.parent / "bent"
    (bent / "pack.json").write_bytes(data.draw(edits((target.pack / "pack.json").read_bytes())))
    with Client(target.daemon.socket) as client:
        try:
            client.load_model("bent", bent)
        except REFUSALS as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            use(target.daemon.socket)
            client.unload_model("bent")
    target.check()


def use(socket: Path) -> None:
    """Right bytes, or a loss that is told."""
    right = {record(layer, expert) for layer in range(3) for expert in range(8)}
    with Client(socket, timeout_seconds=20) as store, store.attach("bent") as session:
        for layer, about in session.model.layers.items():
            for expert in range(min(8, about.num_experts)):
                try:
                    with session.acquire(layer, [expert]) as lease:
                        # What the checksum lets through is one of the records that were made.
                        assert bytes(lease.views[0]) in right
                except LOSSES:
                    continue
