"""What has the name of a pack's file and is none: refused at once, never waited for."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from expertd.disk.record_file import RecordFile
from expertstore.errors import PackError
from expertstore.pack.files import check_path, open_regular
from expertstore.pack.manifest import read_manifest

KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    KINDS[kind](path)
    with pytest.raises(PackError, match="it is not a regular file"):
        read_manifest(tmp_path)
    for direct in (False, True):
        with pytest.raises(PackError, match="cannot be read"):
            RecordFile(path, direct=direct)
    assert not open_files_below(tmp_path)


def test_a_regular_file_is_read_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    descriptor = open_regular(path)
    assert os.read(descriptor, 9) == b"abc"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_paths_that_are_none() -> None:
    with pytest.raises(PackError, match=r"has no pack\.json"):
        read_manifest(Path("/a\0b"))
    with pytest.raises(PackError, match=r"'/a\\udcff' is not UTF-8"):
        check_path(Path(os.fsdecode(b"/a\xff")))
    check_path(Path("/ä"))


def open_files_below(directory: Path) -> list[str]:
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(str(each.readlink()))
    return [path for path in found if path.startswith(str(directory))]
