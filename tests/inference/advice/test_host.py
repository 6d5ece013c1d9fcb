"""The loader is timed on the disk in question, with what a layer would ask for."""

import os
from pathlib import Path

import pytest

from expertd_inference.advice import host


@pytest.mark.parametrize("huge_pages", ["always within_size [advise] never", "always [never]"])
def test_records_are_read_by_the_loader(
    tmp_path: Path, huge_pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shmem = tmp_path / "shmem"
    shmem.write_text(huge_pages)
    staged: list[bool] = []
    loader = host.Loader

    def noted(threads: int, *, staged_: bool) -> host.Loader:
        staged.append(staged_)
        return loader(threads, staged=staged_)

    monkeypatch.setattr(host, "SHMEM", shmem)
    monkeypatch.setattr(host, "Loader", lambda threads, staged: noted(threads, staged_=staged))
    file = tmp_path / "records"
    file.write_bytes(os.urandom(1 << 20))
    kinds = {"a": (8192, 3), "b": (8192, 3), "large": (4 << 20, 1)}
    rate, found = host.readings(file, kinds, lambda _: None)
    assert rate > 0
    assert found["a"] is found["b"], "what is alike is timed once"
    assert found["a"].num_many == 3
    assert min(found["a"].one, found["a"].many) > 0
    # Four times the file: what was read of it stands for the rest.
    assert found["large"].one > 0
    assert staged == ["[never]" in huge_pages] * 2
