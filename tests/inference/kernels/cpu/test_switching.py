"""Where torch's product begins to pay is measured once a host, and remembered."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertd_inference.kernels.cpu import native
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels, measured
from expertd_inference.kernels.cpu.switching import (
    LEAST,
    SMALL,
    STEPS,
    Product,
    Switching,
    any_number,
    form_of,
)
from expertd_inference.process import measured as measured_module
from expertd_inference.process.measured import cache_file
from expertd_testing.patience import HANG_SECONDS
from expertstore.pack.layout import Encoding, Matrix

MATRIX = Matrix("w", Encoding.HQQ, 1024, 512, 4, 64)
BF16 = torch.bfloat16


class Clock:
    """Products take as long as they are told to, and are counted."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: Callable[[int], float]) -> Product:
        def product(matrix: Matrix, rows: Tensor) -> None:
            assert rows.shape[1] == matrix.in_features
            self.calls += 1
            self.now += seconds(len(rows))

        return product


def switching(path: Path, torchs: Callable[[int], float], host: str = "host") -> Switching:
    clock = Clock()
    ours = clock.taking(lambda rows: 1e-3 * rows)
    return Switching(ours, clock.taking(torchs), host, path=path, clock=clock)


@pytest.mark.parametrize(
    ("faster_from", "most"),
    [(1, LEAST), (33, 32), (128, 32), (129, 128), (512, 128), (513, None)],
)
def test_the_last_number_at_which_ours_is_faster(
    tmp_path: Path, faster_from: int, most: int | None
) -> None:
    found = switching(tmp_path / "s", lambda rows: rows * (2e-3 if rows < faster_from else 0.5e-3))
    assert found(MATRIX, BF16) == most


def test_what_is_near_is_left_to_ours(tmp_path: Path) -> None:
    assert switching(tmp_path / "s", lambda rows: 0.95e-3 * rows)(MATRIX, BF16) is None


def test_a_small_matrix_is_not_measured(tmp_path: Path) -> None:
    found = switching(tmp_path / "s", lambda _: 0)
    assert found(Matrix("w", Encoding.PLAIN, SMALL // 64 - 1, 64), BF16) is None
    assert found(Matrix("w", Encoding.PLAIN, SMALL // 64, 64), BF16) == LEAST


def test_it_is_measured_once_for_a_host(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "switching.json"
    first = switching(path, lambda _: 0)
    assert first(MATRIX, BF16) == first(MATRIX, BF16) == LEAST
    assert switching(path, lambda _: 1e9)(MATRIX, BF16) == LEAST
    # Of another form, dtype or host it is another matter, and the first stays remembered.
    other = Matrix("w", Encoding.HQQ, 1024, 512, 4, 32)
    assert switching(path, lambda _: 1e9)(other, BF16) is None
    assert switching(path, lambda _: 1e9)(MATRIX, torch.float32) is None
    assert switching(path, lambda _: 1e9, "another")(MATRIX, BF16) is None
    assert switching(path, lambda _: 1e9)(MATRIX, BF16) == LEAST


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"host": "many"}', b"\xff"])
def test_a_damaged_file_is_measured_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "switching.json"
    path.write_bytes(content)
    assert said_of(path) == [f"{path} could not be read (it is damaged), and is written anew."]
    assert switching(path, lambda _: 1e9)(MATRIX, BF16) == LEAST


def test_a_number_that_was_never_measured_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "switching.json"
    assert switching(path, lambda _: 0)(MATRIX, BF16) == LEAST
    path.write_text(path.read_text().replace(f":{LEAST}", f":{LEAST + 1}"))
    assert switching(path, lambda _: 1e9)(MATRIX, BF16) is None


def said_of(path: Path) -> list[str]:
    said: list[str] = []
    found = switching(path, lambda _: 0)
    # Of the lazy way nobody is told, and then once.
    assert found(MATRIX, BF16) == LEAST
    for _ in range(2):
        assert found.measure([(MATRIX, BF16)], said.append) == {form_of(MATRIX, BF16): LEAST}
    return said


def test_a_home_that_cannot_be_written_to_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "switching.json"
    (said,) = said_of(path)
    assert said.startswith(f"{path} cannot be written (")
    assert said.endswith("make it writable, or set XDG_CACHE_HOME.")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert cache_file("switching.json") is None
    clock = Clock()
    found = Switching(clock.taking(lambda _: 1), clock.taking(lambda _: 0), "host", clock=clock)
    said: list[str] = []
    assert found.measure([(MATRIX, BF16)], said.append) == {form_of(MATRIX, BF16): LEAST}
    assert said[0].startswith("There is no home directory, so each start measures anew")


def test_nothing_is_said_of_a_file_that_is_new_or_known(tmp_path: Path) -> None:
    assert said_of(tmp_path / "switching.json") == []
    assert said_of(tmp_path / "switching.json") == []


def test_workers_that_start_together_measure_once(tmp_path: Path) -> None:
    path = tmp_path / "switching.json"
    begun, go_on = threading.Event(), threading.Event()

    def slowly(rows: int) -> float:
        begun.set()
        assert go_on.wait(HANG_SECONDS)
        return 0

    first, second = switching(path, slowly), switching(path, lambda _: 1e9)
    forms = [(MATRIX, BF16), (Matrix("w", Encoding.PLAIN, SMALL // 64 - 1, 64), BF16)]
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(first.measure, forms)
        assert begun.wait(HANG_SECONDS)
        theirs = pool.submit(second.measure, forms)
        with pytest.raises(TimeoutError):
            theirs.result(0.1)
        go_on.set()
        assert ours.result() == theirs.result() == {form_of(MATRIX, BF16): LEAST}


def test_one_that_was_stopped_while_it_measured_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "switching.json"
    with measured_module._alone(path):
        monkeypatch.setattr(measured_module, "MAX_WAIT_SECONDS", 0)
        assert switching(path, lambda _: 0)(MATRIX, BF16) == LEAST
    assert switching(path, lambda _: 1e9)(MATRIX, BF16) == LEAST, "it is remembered all the same"


@pytest.mark.skipif(native_library().library is None, reason="no native kernels")
def test_real_products_of_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_file("switching.json")
    assert path is not None
    assert path.parent.parent != Path.home() / ".cache", "tests have their own"
    assert NativeKernels(exact=True).most_rows is any_number
    monkeypatch.setattr(native, "_some_weight", native._some_weight.__wrapped__)
    found = measured(16)
    for matrix in (
        MATRIX,
        Matrix("w", Encoding.HQQ, 1024, 512, 3, 64, 128),
        Matrix("w", Encoding.MXFP4, 1024, 512, 4, 32),
        Matrix("w", Encoding.PLAIN, 1024, 512),
    ):
        assert found(matrix, BF16) in (None, LEAST, *STEPS)
