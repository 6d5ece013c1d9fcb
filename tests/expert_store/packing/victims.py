"""Packings that are killed at given moments: ``python -m ... SOURCE SPARSE FOLDER MOMENT...``.

One process that has imported torch, but started none of its threads, forks a victim for each
moment: the number of the step before which it dies, or the call that it does not survive.
The packing of moment M goes to FOLDER/M. Another fork packs SPARSE and writes the memory that
it took to FOLDER/memory.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from expertd.packing import packer
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.schemes import choose_scheme

STEP_UNCOMMITTED = 11
OFFSET_TORN = 200_000


def main(source: Path, sparse: Path, folder: Path, moments: list[str]) -> None:
    Checkpoint(source).close()  # imports the model's code, which would take each victim seconds
    if not os.fork():
        (folder / "memory").write_text(str(pack_counting_memory(sparse, folder / "sparse")))
        os._exit(0)
    os.wait()
    for moment in moments:
        pid = os.fork()
        if not pid:
            pack_and_die(source, folder / moment, moment)
            os._exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), moment
        assert os.WTERMSIG(status) == signal.SIGKILL, moment


def pack_counting_memory(source: Path, destination: Path) -> int:
    """The peak of memory beyond what importing took."""
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    packer.pack(packer.Request(source, destination, choose_scheme("bf16")))
    return memory_status("VmHWM") - before


def memory_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def pack_and_die(source: Path, destination: Path, moment: str) -> None:
    write, rmtree = packer._write, shutil.rmtree

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_progress(progress: packer.Progress) -> None:
        if moment == str(progress.done_steps):
            die()
        if moment == "uncommitted" and progress.done_steps == STEP_UNCOMMITTED:
            die()

    def tear(fd: int, data: memoryview, offset: int) -> None:
        if offset > OFFSET_TORN:
            write(fd, data[: len(data) // 2], offset)
            die()
        write(fd, data, offset)

    def remove(path: Path) -> None:
        if path.name.endswith(".partial"):
            die()
        rmtree(path)

    # Every step is committed, so that each victim leaves another journal.
    packer.COMMIT_SECONDS = 1e9 if moment == "uncommitted" else 0.0
    if moment == "torn":
        packer._write = tear
    elif moment == "rename":
        Path.rename = die  # type: ignore[method-assign,assignment]
    elif moment == "cleanup":
        shutil.rmtree = remove  # type: ignore[assignment]
    elif hasattr(packer, moment):
        setattr(packer, moment, die)
    request = packer.Request(source, destination, choose_scheme("4bit"), optimize=False)
    packer.pack(request, on_progress=on_progress)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
