"""Every RPC, with requests of all kinds: the daemon answers, and no answer is INTERNAL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.shared.handshake import rpc_target
from expertstore.v1 import expert_store_pb2 as pb
from tests.fuzz.budget import bounded
from tests.fuzz.requests import METHODS, SERVICE, Request, requests
from tests.fuzz.target import Culprit, Target, fuzzed

# What only a bug of ours answers. CANCELLED and DEADLINE_EXCEEDED are the caller's own doing.
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
ANYONE = ["worker", "reader", "admin", "nobody", "stranger", "late", "long", "twice"]
PATHS = ["/", "/dev", "/dev/zero", "/proc/self", "/nowhere", "x", "", "/a\0b", "/" + "x" * 5000]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Culprit]]:
    with fuzzed(tmp_path_factory.mktemp("fuzz")) as scene:
        yield scene


@pytest.fixture(scope="module")
def channel(scene: tuple[Target, Culprit]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(rpc_target(scene[0].daemon.socket)) as channel:
        yield channel


def hints(other: Path) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "layer": st.integers(0, 3),
        "expert": st.integers(0, 8),
        "name": st.sampled_from(["m", "x", "x", "y", "", "a=b", "a/b", "\0", "x" * 200]),
        "model": st.sampled_from(["m", "x", "nobody"]),
        "pack_path": st.sampled_from([str(other), str(other), *PATHS]),
        "fetch_number": st.integers(1, 1000),
        "interval_seconds": st.sampled_from([0.0, 0.05, 0.049, -1.0, 1e300, float("nan")]),
        "priority": st.integers(-2, 2),
    }


@bounded(300)
@given(data=st.data())
def test_every_rpc(
    data: st.DataObject, scene: tuple[Target, Culprit], channel: grpc.Channel
) -> None:
    target, culprit = scene
    calls = data.draw(
        st.lists(requests(hints(target.pack.parent / "other"), who), min_size=1, max_size=6)
    )
    # All at once; those that stream are read afterwards.
    pending = [(call, start(channel, call, culprit)) for call in calls if allowed(call)]
    for call, answer in pending:
        code = outcome(call, answer)
        assert code not in BUGS, (call, code, answer.details(), target.daemon.stderr[-3000:])
    culprit.settle()
    start(channel, Request("Unpin", b"", "worker", 5.0, 0), culprit).result()
    target.check()


def who(method: str) -> st.SearchStrategy[str]:
    """Mostly those who may."""
    entitled = "admin" if method in {"LoadModel", "UnloadModel"} else "worker"
    return st.sampled_from([*ANYONE, *[entitled] * 20])


def allowed(call: Request) -> bool:
    """All but dropping the model that the honest worker uses."""
    if call.method != "UnloadModel":
        return True
    return b"m" not in call.data


def start(channel: grpc.Channel, call: Request, culprit: Culprit) -> Any:
    path = f"/{SERVICE.full_name}/{call.method}"
    kind = channel.unary_stream if METHODS[call.method].server_streaming else channel.unary_unary
    method: Any = kind(path)
    credentials = culprit.credentials(call.who)
    if METHODS[call.method].server_streaming:
        return method(call.data, timeout=call.seconds, metadata=credentials)
    return method.future(call.data, timeout=call.seconds, metadata=credentials)


def outcome(call: Request, answer: Any) -> grpc.StatusCode:
    try:
        if METHODS[call.method].server_streaming:
            for _ in range(call.messages):
                next(answer, None)
            answer.cancel()
        else:
            answer.result()
    except grpc.RpcError:
        pass
    code: grpc.StatusCode = answer.code()
    return code


def test_the_hints_name_fields() -> None:
    """A field that was renamed would be fuzzed with noise alone."""
    names = {field.name for each in METHODS.values() for field in each.input_type.fields}
    names |= {field.name for field in pb.ExpertRef.DESCRIPTOR.fields}
    assert set(hints(Path())) <= names
