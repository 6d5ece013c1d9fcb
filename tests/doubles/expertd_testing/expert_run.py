"""The command ``expert-run`` with ``--device fake:0``: ``python -m expertd_testing.expert_run``.

Engines of ``serve`` have fake devices, too, all of which SIGUSR1 to an engine's process loses.
"""

import signal
import sys

from expertd_inference.cli import main
from expertd_inference.process.environment import prepare_environment


def _offer() -> None:
    # Before torch is imported, which the fake device does, as the command itself would.
    prepare_environment(device="fake:0")
    from expertd_testing.fake_device import FakeDevice, offer_fake_devices

    offer_fake_devices(opened := list[FakeDevice]())

    def lose(*_: object) -> None:
        for device in opened:
            device.lose()

    signal.signal(signal.SIGUSR1, lose)


if __name__ == "__main__":
    if sys.argv[1:2] != ["serve"]:  # whose front computes nothing
        _offer()
    main()
elif __name__ == "__mp_main__":  # as multiprocessing names it in a process that is spawned
    _offer()
