"""The daemon, writing down where each record begins that it reads: ``python -m`` this.

To the file that the environment variable READS names; a line per record, ``FILE OFFSET``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import expertd.disk.loader
from expertd.cli import main


def watch(log: Path) -> None:
    """From now on, in this process."""
    plain = expertd.disk.loader.RecordFile.read_some
    lines = log.open("a", buffering=1)

    def read_some(
        self: expertd.disk.loader.RecordFile, targets: Sequence[memoryview], offset: int
    ) -> int:
        start, text = offset, ""
        for target in targets:
            text += f"{self.path.name} {start}\n"
            start += len(target)
        lines.write(text)
        return plain(self, targets, offset)

    expertd.disk.loader.RecordFile.read_some = read_some  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(Path(os.environ["READS"]))
    main()
