"""The attach socket: bytes, JSON of all shapes, descriptors that nobody asked for."""

import json
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.shared.handshake import ATTACH_SOCKET, PROTOCOL_VERSION, Hello, Refusal, Welcome
from tests.fuzz.budget import bounded
from tests.fuzz.target import Culprit, Target, fuzzed

ANSWER = msgspec.json.Decoder(Welcome | Refusal)
# What a daemon may say to a hello; INTERNAL would be a bug of ours.
REFUSALS = {
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
}
MAX_DESCRIPTORS = 253  # Linux's SCM_MAX_FD

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                 max_size=3),
    max_leaves=8,
)  # fmt: skip
FIELDS = {
    "protocol": st.one_of(st.just(PROTOCOL_VERSION), st.integers(0, 3), JSON),
    "role": st.one_of(st.sampled_from(["worker", "reader", "admin"]), JSON),
    "model": st.one_of(st.sampled_from(["m", "", "\0", "\ud800", "n" * 3900]), JSON),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Culprit]]:
    with fuzzed(tmp_path_factory.mktemp("fuzz")) as scene:
        yield scene


@st.composite
def hellos(draw: st.DrawFn) -> bytes:
    """A hello of which something may be wrong."""
    hello: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "role": "worker", "model": "m"}
    for name in draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=2)):
        hello[name] = draw(FIELDS[name])
    for name in draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=1)):
        del hello[name]
    hello |= draw(st.dictionaries(st.text(max_size=5), JSON, max_size=1))
    encoded = bytearray(
        json.dumps(hello, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    )
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        encoded[draw(st.integers(0, len(encoded) - 1))] = draw(st.integers(0, 255))
    return bytes(encoded[: draw(st.sampled_from([len(encoded), len(encoded), 20, 1]))])


PACKETS = st.one_of(
    hellos(),
    hellos(),
    st.binary(min_size=1, max_size=5000),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.integers(1, 4000).map(lambda depth: b'{"model":' * (depth // 9) + b"[" * (depth % 2000)),
    st.just(b'{"protocol":2' + b"0" * 4000 + b"}"),
)


@bounded(500)
@given(
    packet=PACKETS,
    num_descriptors=st.sampled_from([0, 0, 0, 1, MAX_DESCRIPTORS]),
    more=st.lists(st.binary(max_size=20), max_size=3),
    reads=st.booleans(),
)
def test_whatever_is_said(
    packet: bytes,
    num_descriptors: int,
    more: list[bytes],
    reads: bool,
    scene: tuple[Target, Culprit],
) -> None:
    target, _ = scene
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(target.daemon.socket / ATTACH_SOCKET))
        send(connection, packet, num_descriptors)
        with suppress(BrokenPipeError, ConnectionResetError):  # put out already
            for each in more:
                connection.send(each)
        if reads:
            answer = answer_of(connection)
            assert sound(packet) or not isinstance(answer, Welcome)
    target.check()


def send(connection: socket.socket, packet: bytes, num_descriptors: int) -> None:
    with open(os.devnull, "rb") as file:  # noqa: PTH123
        descriptors = array("i", [file.fileno()] * num_descriptors)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        connection.sendmsg([packet], control)


def answer_of(connection: socket.socket) -> Welcome | Refusal | None:
    """What the daemon says, None if it hangs up."""
    try:
        data, control, flags, _ = connection.recvmsg(1 << 16, 1 << 12, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    for _, _, raw in control:
        for descriptor in memoryview(raw).cast("i"):
            os.close(descriptor)
    if not data:
        return None
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    answer: Welcome | Refusal = ANSWER.decode(data)
    if isinstance(answer, Refusal):
        assert answer.code in REFUSALS, answer
        assert len(data) <= 4096
    return answer


def sound(packet: bytes) -> bool:
    try:
        hello = msgspec.json.decode(packet, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return hello.protocol == PROTOCOL_VERSION and (hello.role != "worker" or hello.model == "m")
