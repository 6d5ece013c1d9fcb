"""The journal: what was committed is there again, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from expertd.packing.journal import Journal
from expertstore.errors import PackError

ONE, TWO = "1" * 16, "2" * 16


def begun(path: Path, key: str = "key") -> Journal:
    journal = Journal(path, key)
    if not journal.matches:
        journal.begin()
    return journal


def test_only_committed_steps_are_there_again(tmp_path: Path) -> None:
    with begun(tmp_path / "journal") as journal:
        journal.add(0, ONE)
        journal.add(7, TWO)
        journal.commit()
        journal.add(8, TWO)
    with Journal(tmp_path / "journal", "key") as journal:
        assert journal.matches
        assert journal.done == {0: ONE, 7: TWO}


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(f"key\n0 {ONE}\n1 {TWO[:9]}".encode())
    with Journal(path, "key") as journal:
        assert journal.done == {0: ONE}
        journal.add(1, TWO)
        journal.commit()
    assert path.read_bytes() == f"key\n0 {ONE}\n1 {TWO}\n".encode()


@pytest.mark.parametrize(
    "content", [b"", b"key", b"other\n", b"key\nx\n", b"key\n\xff\n", b"key\n1 2\n"]
)
def test_other_journals_do_not_match(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with Journal(tmp_path / "journal", "key") as journal:
        assert not journal.matches
        journal.begin()
        assert journal.matches
        assert not journal.done
    assert (tmp_path / "journal").read_bytes() == b"key\n"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with begun(path), pytest.raises(PackError, match="Another expertd is writing to"):
        Journal(path, "key")
    program = f"import fcntl; fcntl.flock(open({str(path)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with begun(path):
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode != 0
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    journal = begun(tmp_path / "journal")
    journal.close()
    journal.close()
