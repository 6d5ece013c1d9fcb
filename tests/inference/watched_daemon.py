"""The daemon, writing down where each record begins that it reads: ``python -m`` this.

To the file that the environment variable READS names; a line per record, ``FILE OFFSET``. To be
started with ``--disk-io direct``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from expertd.cli import main
from expertd.disk.record_file import RecordFile


def watch(log: Path) -> None:
    """From now on, in this process."""
    plain = RecordFile.read_some
    lines = log.open("a", buffering=1)

    def read_some(self: RecordFile, targets: Sequence[memoryview], offset: int) -> int:
        start, text = offset, ""
        for target in targets:
            text += f"{self.path.name} {start}\n"
            start += len(target)
        lines.write(text)
        return plain(self, targets, offset)

    RecordFile.read_some = read_some  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(Path(os.environ["READS"]))
    main()
