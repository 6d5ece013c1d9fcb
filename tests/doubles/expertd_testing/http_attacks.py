"""What a hostile client may do to a server, each until it is told to end.

``python -m expertd_testing.http_attacks NAME HOST PORT``: says "attacking" once it is under way,
and at the end, when its input closes, what the server answered and how often.
"""

import asyncio
import os
import resource
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

NUM_CONNECTIONS = 2000
DRIP_SECONDS = 1.0
_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


class HttpAttack:
    """On whom, and what came of it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self.said: Counter[str] = Counter()

    def begin(self) -> None:
        """Called by the attack when it is under way."""
        print("attacking", flush=True)

    @contextmanager
    def told(self) -> Iterator[None]:
        """The server's way to end a connection is told, and no failure of the attack."""
        try:
            yield
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.said[type(error).__name__] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection more."""
        return await asyncio.open_connection(*self._address)

    async def send(self, *pieces: bytes, half_closes: bool = False) -> None:
        """One request on a connection of its own, whose answer is read to its end."""
        with self.told():
            reader, writer = await self.connect()
            try:
                writer.writelines(pieces)
                if half_closes:
                    writer.write_eof()
                await writer.drain()
                status = await reader.readline()
                self.said[status[9:12].decode() or "closed"] += 1
                while await reader.read(1 << 16):
                    pass
            finally:
                writer.close()


async def silence(attack: HttpAttack) -> None:
    """Connections that say nothing; each that is closed is opened again."""
    await _held(attack, b"", b"")


async def slow_heads(attack: HttpAttack) -> None:
    """Headers that come by the letter."""
    await _held(attack, b"GET /v1/models HTTP/1.1\r\nX-Slow: ", b"x")


async def slow_bodies(attack: HttpAttack) -> None:
    """Bodies that come by the letter."""
    await _held(attack, _POST + b"Content-Length: 30000000\r\n\r\n", b" ")


async def deaf_streams(attack: HttpAttack) -> None:
    """Eight streams of which nothing is read."""
    body = (
        b'{"prompt": "def", "max_tokens": 900, "ignore_eos": true, "stream": true, "logprobs": 5}'
    )
    head = _POST + b"Content-Length: %d\r\n\r\n" % len(body)
    connections = [await attack.connect() for _ in range(8)]
    for reader, writer in connections:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(head + body)
    attack.begin()
    await asyncio.Event().wait()


async def half_closed(attack: HttpAttack) -> None:
    """Clients that say at once that they will say no more."""
    await _flood(attack, lambda: attack.send(b"GET /v1/models HTTP/1.1\r\n\r\n", half_closes=True))


async def reconnecting(attack: HttpAttack) -> None:
    """Connections that come and go."""

    async def once() -> None:
        with attack.told():
            _, writer = await attack.connect()
            writer.close()
            attack.said["connected"] += 1

    await _flood(attack, once)


async def pipelined(attack: HttpAttack) -> None:
    """Thousands of requests at once, whose answers are read."""
    many = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000
    await _flood(attack, lambda: attack.send(many))


async def endless_headers(attack: HttpAttack) -> None:
    """Megabytes of them."""
    line = b"X-More: " + b"x" * 1000 + b"\r\n"
    await _flood(attack, lambda: attack.send(b"GET / HTTP/1.1\r\n", line * 8000))


async def large_bodies(attack: HttpAttack) -> None:
    """As many values as are read, of tokens that are none."""
    body = b'{"prompt": [' + b"[-1]," * 500_000 + b"[1]]}"
    head = _POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await _flood(attack, lambda: attack.send(head, body))


async def long_texts(attack: HttpAttack) -> None:
    """Prompts as long as a body may be."""
    body = b'{"max_tokens": 1, "prompt": "' + b"for each in the list: " * 370_000 + b'"}'
    head = _POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await _flood(attack, lambda: attack.send(head, body))


async def too_large_bodies(attack: HttpAttack) -> None:
    """In pieces, so that only counting tells."""
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    head = _POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    await _flood(attack, lambda: attack.send(head, *[piece] * 40))


async def deep_bodies(attack: HttpAttack) -> None:
    """Lists in lists."""
    body = b'{"prompt": ' + b"[" * 1_000_000
    head = _POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await _flood(attack, lambda: attack.send(head, body))


ATTACKS: dict[str, Callable[[HttpAttack], Awaitable[None]]] = {
    attack.__name__: attack
    for attack in (
        *(silence, slow_heads, slow_bodies, deaf_streams, half_closed, reconnecting, pipelined),
        *(endless_headers, large_bodies, long_texts, too_large_bodies, deep_bodies),
    )
}


async def _held(attack: HttpAttack, first: bytes, drop: bytes) -> None:
    """So many connections at once; what the server closes comes again."""
    opening = asyncio.Semaphore(100)
    opened = 0
    enough = asyncio.Event()

    async def hold() -> None:
        nonlocal opened
        while True:
            with attack.told():
                async with opening:
                    reader, writer = await attack.connect()
                    attack.said["connected"] += 1
                opened += 1
                if opened >= NUM_CONNECTIONS:
                    enough.set()
                writer.write(first)
                while not reader.at_eof():
                    writer.write(drop)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1 << 10), DRIP_SECONDS)
                writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CONNECTIONS):
            group.create_task(hold())
        await enough.wait()
        attack.begin()


async def _flood(attack: HttpAttack, once: Callable[[], Awaitable[None]]) -> None:
    """Four at a time, ever again."""

    async def again() -> None:
        while True:
            await once()

    async with asyncio.TaskGroup() as group:
        attack.begin()
        for _ in range(4):
            group.create_task(again())


async def _until_told(attack: HttpAttack, name: str) -> None:
    work = asyncio.ensure_future(ATTACKS[name](attack))
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        await work
    print(dict(attack.said), flush=True)
    os._exit(0)  # thousands of connections would be closed one by one


def main() -> None:
    """The process of one attack."""
    name, host, port = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_until_told(HttpAttack(host, int(port)), name))


if __name__ == "__main__":
    main()
