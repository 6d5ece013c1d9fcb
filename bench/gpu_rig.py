"""What the parts of ``bench.gpu`` share: a device, packs, a daemon that has loaded them.

torch and transformers take seconds to import, and are imported by what needs them: a stage of
``bench.gpu_slot`` that does not begins at once.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertd_client import Client, Session
from expertd_inference import EmbeddedDaemon

if TYPE_CHECKING:
    from expertd_inference.device.device import Device

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
"""What makes a real model's shape small enough for the fake."""


class OutOfTimeError(Exception):
    """What is left of the bench's time is too little for the next part."""


@dataclass(frozen=True)
class Rig:
    """What a part is to run with. ``fake``: on the fake device, to see that the bench works."""

    folder: Path
    say: Callable[[str], None]
    deadline: float
    """By :func:`time.monotonic`."""
    fake: bool = False
    traces: Sequence[Path] = ()
    shapes: Sequence[str] = ("qwen3-30b-a3b", "mixtral-8x7b")

    def has(self, seconds: float) -> bool:
        """Whether so much is left; the fake has all the time it needs."""
        return self.fake or time.monotonic() + seconds <= self.deadline

    def need(self, seconds: float) -> None:
        """Raises OutOfTimeError if so much is not left."""
        if not self.has(seconds):
            raise OutOfTimeError(f"less than {seconds:.0f} s are left")

    def open_device(self, *, staged: bool = False) -> "Device":
        """The first GPU, anew."""
        if self.fake:
            from expertd_testing.fake_device import FakeDevice

            return FakeDevice("fake:0", memory_bytes=1 << 30, registers=not staged)
        from expertd_inference.device.cuda import CudaDevice

        return CudaDevice("cuda:0", say=self.say, staged=staged)

    def make_pack(self, shape: str, scheme: str, **overrides: int) -> Path:
        """Made once. Its file holds few different records, which the daemon loads as many."""
        path = self.folder / f"{shape}-{scheme}"
        if not path.exists():
            self.say(f"writing a pack of {shape}, {scheme}")
            from bench.synthetic import make_pack

            changed = {**overrides, **(TINY if self.fake else {})}
            make_pack(path, shape, scheme, 2 if self.fake else None, overrides=changed)
        return path


@contextmanager
def loaded(rig: Rig, pack: Path) -> Iterator[tuple[Client, Session]]:
    """A daemon that has all experts of ``pack`` in RAM, and a session for them."""
    rig.say(f"loading {pack.name} into a daemon")
    with (
        EmbeddedDaemon(pack) as daemon,
        Client(daemon.socket, timeout_seconds=300) as client,
        client.attach(daemon.name) as session,
    ):
        for layer in session.model.layers.values():
            for lease in session.waves(layer.layer, range(layer.num_experts)):
                lease.release()
        yield client, session


def seconds_of(device: "Device", action: Callable[[], object]) -> float:
    """Until all that ``action`` has queued is done, by the device's clock."""
    device.mark().wait()
    begin = device.clock()
    event: Any = action()
    (event if event is not None else device.mark()).wait()
    return device.clock() - begin


def writable_memory(num_bytes: int) -> tuple[Any, int]:
    """Shared memory that this process may write to, touched, and its address."""
    descriptor = os.memfd_create("bench")
    os.ftruncate(descriptor, num_bytes)
    mapping = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    anchor = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(anchor)
    ctypes.memset(address, 1, num_bytes)
    return (mapping, anchor), address
