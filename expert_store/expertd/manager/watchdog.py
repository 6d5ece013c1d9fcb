"""Feeding the service manager's watchdog, for as long as the daemon really works.

What is told is not that a timer ran, but that the event loop took up a task, that a loader
thread took a job from the queue, and that the loop heard of its end. If either hangs, nothing
is told, and the manager kills and restarts the daemon.
"""

import asyncio

from expertd.disk.loader import Loader
from expertd.log import log_error
from expertd.manager.systemd import Manager

FEEDS_PER_INTERVAL = 3


async def feed_watchdog(manager: Manager, loader: Loader) -> None:
    """Runs until it is cancelled; returns at once if no watchdog is wanted."""
    if manager.watchdog_seconds is None:
        return
    pause = manager.watchdog_seconds / FEEDS_PER_INTERVAL
    while True:
        answer = probe(loader)
        if not (await asyncio.wait([answer], timeout=pause))[0]:
            log_error("loader does not answer", waited_seconds=pause)
            await answer
        await manager.alive()
        await asyncio.sleep(pause)


def probe(loader: Loader) -> asyncio.Future[None]:
    """Done once a loader thread has taken a job and the loop has heard of it."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not answer.done():
            answer.set_result(None)

    loader.probe(lambda: loop.call_soon_threadsafe(settle))
    return answer
