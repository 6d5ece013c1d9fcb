"""What a hostile process of an allowed user may do to the daemon, each until it is told to end.

``python -m expertd_testing.attacks NAME SOCKET``: says "attacking" once it is under way, and at the
end, when its input closes, how often it got what it wanted and how often it was refused.
"""

import os
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc

from expertd_testing.raw_worker import RawWorker
from expertstore.errors import ExpertdError
from expertstore.shared.greeting import Greeting, handshake
from expertstore.shared.handshake import ATTACH_SOCKET, Role, rpc_target
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

CALL_SECONDS = 10.0
MILLION = 1_000_000
MAX_SESSIONS = 256
"""The default of max_sessions."""
Said = Counter[str]


class Attack:
    """Where, until when, and what came of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: Said = Counter()
        self.over = threading.Event()

    def begin(self) -> None:
        """Called by the attack when it is under way."""
        print("attacking", flush=True)


def million_ids(attack: Attack) -> None:
    """Lists of a million experts: 3.8 MB in a message, which is refused by its length alone."""
    request = _repeated(pb.ExpertRef(layer=1, expert=1), MILLION)
    assert len(request) > 5 * MILLION
    _flood(attack, request)


def eight_megabytes(attack: Attack) -> None:
    """Eight megabytes that are no message."""
    _flood(attack, b"\xff" * (8 << 20))


def longest_list(attack: Attack) -> None:
    """The longest list that a message may hold: a quarter of a million experts of no bytes."""
    request = _repeated(pb.ExpertRef(), 250_000)
    assert len(request) < 512 << 10
    _flood(attack, request)


def thousand_sessions(attack: Attack) -> None:
    """As many as it gets, and it keeps them; then it goes on asking."""
    with ExitStack() as stack:
        for _ in range(1000):
            _attach(attack, stack)
        attack.begin()
        while not attack.over.is_set():
            _attach(attack, stack)


def comings_and_goings(attack: Attack) -> None:
    """Sessions that end as soon as they have begun."""
    attack.begin()
    while not attack.over.is_set():
        with ExitStack() as stack:
            _attach(attack, stack)


def silent_connections(attack: Attack) -> None:
    """A thousand connections that say nothing, again and again."""
    with ExitStack() as stack:
        for index in range(MILLION):
            if index == 1000:
                attack.begin()
            if attack.over.is_set():
                return
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(CALL_SECONDS)
            try:
                connection.connect(str(attack.directory / ATTACH_SOCKET))
                attack.said["connected"] += 1
            except OSError as error:
                attack.said[type(error).__name__] += 1
            if index % 1000 == 999:
                stack.close()


def garbage(attack: Attack) -> None:
    """Hellos cut in half, and packets after the hello that a worker must not send."""
    attack.begin()
    while not attack.over.is_set():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(CALL_SECONDS)
            with suppress(OSError):
                connection.connect(str(attack.directory / ATTACH_SOCKET))
                hello = b'{"protocol":2,"role":"worker","model":"m"}'
                connection.send(hello[: len(hello) // 2] if attack.said["put out"] % 2 else hello)
                for _ in range(1000):
                    connection.send(b"N")
            attack.said["put out"] += 1


def unread_streams(attack: Attack) -> None:
    """A hundred Reads of everything, of which nobody takes a byte."""
    with handshake(attack.directory, Role.READER, "", CALL_SECONDS) as greeting:
        channel, stub = _stub(attack)
        refs = [
            pb.ExpertRef(layer=layer, expert=expert) for layer in range(3) for expert in range(8)
        ]
        request = pb.ReadRequest(model="m", experts=refs)
        with channel:
            while True:
                streams = [stub.Read(request, metadata=greeting.credentials) for _ in range(100)]
                if not attack.said:
                    attack.begin()
                attack.said["streams"] += len(streams)
                over = attack.over.wait(5)
                for stream in streams:
                    stream.cancel()
                if over:
                    return


def watchers(attack: Attack) -> None:
    """A hundred WatchStats at the shortest interval."""
    channel, stub = _stub(attack)
    with channel:
        streams = [stub.WatchStats(pb.WatchStatsRequest(interval_seconds=0.05)) for _ in range(100)]

        def read(stream: Iterable[pb.WatchStatsResponse]) -> None:
            with suppress(grpc.RpcError):
                for _ in stream:
                    attack.said["stats"] += 1

        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        attack.begin()
        attack.over.wait()
        for stream in streams:
            stream.cancel()
        for thread in threads:
            thread.join()


def hints_and_impatience(attack: Attack) -> None:
    """Hints at everything, and fetches whose caller has gone before they can be granted."""
    with RawWorker(attack.directory) as worker:
        attack.begin()
        number = 0
        everything = [(layer, expert) for layer in range(3) for expert in range(8)]
        while not attack.over.is_set():
            number += 1
            refs = [pb.ExpertRef(layer=layer, expert=expert) for layer, expert in everything]
            hint = worker.stub.Prefetch.future(
                pb.PrefetchRequest(experts=refs, priority=2**31 - 1),
                metadata=worker.credentials,
                timeout=CALL_SECONDS,
            )
            fetch = worker.stub.Fetch.future(
                pb.FetchRequest(experts=refs[number % 3 * 8 :][:8], fetch_number=number),
                metadata=worker.credentials,
                timeout=0.001,
            )
            for call in (hint, fetch):
                with suppress(grpc.RpcError):
                    call.result()
                attack.said[call.code().name] += 1
            worker.page.released_fetch = number


def rings(attack: Attack) -> None:
    """Sessions that claim to have touched a whole ring of experts whenever the daemon looks."""
    with ExitStack() as stack:
        pages = [stack.enter_context(RawWorker(attack.directory)).page for _ in range(16)]
        for page in pages:
            page.touch(list(range(24)) * (page.ring_entries // 24))
        attack.begin()
        while not attack.over.wait(0.01):
            for page in pages:
                page._words[4] += page.ring_entries
            attack.said["rings"] += len(pages)


ATTACKS: dict[str, Callable[[Attack], None]] = {
    each.__name__: each
    for each in (
        million_ids,
        eight_megabytes,
        longest_list,
        thousand_sessions,
        comings_and_goings,
        silent_connections,
        garbage,
        unread_streams,
        watchers,
        hints_and_impatience,
        rings,
    )
}


def main() -> None:
    """The process of one attack."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack = Attack(Path(sys.argv[2]))

    def watch_input() -> None:
        sys.stdin.read()
        attack.over.set()

    threading.Thread(target=watch_input, daemon=True).start()
    ATTACKS[sys.argv[1]](attack)
    print(dict(attack.said), flush=True)
    os._exit(0)  # a thousand sessions may also end all at once


def _repeated(ref: pb.ExpertRef, count: int) -> bytes:
    """A PrefetchRequest with ``count`` experts, without making them one by one."""
    return pb.PrefetchRequest(experts=[ref]).SerializeToString() * count


def _flood(attack: Attack, request: bytes) -> None:
    """Sends it, ever again, four at a time."""
    with RawWorker(attack.directory) as worker:
        channel = grpc.insecure_channel(rpc_target(attack.directory))
        with channel:
            prefetch: Any = channel.unary_unary("/expertstore.v1.ExpertStore/Prefetch")
            attack.begin()
            while not attack.over.is_set():
                calls = [
                    prefetch.future(request, metadata=worker.credentials, timeout=CALL_SECONDS)
                    for _ in range(4)
                ]
                for call in calls:
                    with suppress(grpc.RpcError):
                        call.result()
                    attack.said[call.code().name] += 1


def _attach(attack: Attack, stack: ExitStack) -> Greeting | None:
    try:
        greeting = handshake(attack.directory, Role.WORKER, "m", CALL_SECONDS)
    except (ExpertdError, OSError) as error:
        attack.said[type(error).__name__] += 1
        time.sleep(0)
        return None
    attack.said["attached"] += 1
    return stack.enter_context(greeting)


def _stub(attack: Attack) -> tuple[grpc.Channel, rpc.ExpertStoreStub]:
    channel = grpc.insecure_channel(rpc_target(attack.directory))
    return channel, rpc.ExpertStoreStub(channel)


if __name__ == "__main__":
    main()
