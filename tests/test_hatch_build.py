"""The build hook builds what is out of date, and fails no install for want of a compiler."""

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from hatch_build import Library, build, find_compiler

EXPORT = 'extern "C" __attribute__((visibility("default"))) int answer()'
SOURCE = EXPORT + " { return %d; }\n"
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(tmp_path, "libanswer.so")
    (tmp_path / "answer.cpp").write_text(SOURCE % 42)
    monkeypatch.setattr(hatch_build, "LIBRARIES", (library,))
    return library


def answer(library: Library) -> int:
    # In a process of its own: this one would go on using the library that it loaded first.
    code = f"import ctypes; print(ctypes.CDLL({str(library.result)!r}).answer())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@needs_compiler
def test_builds_what_changed_and_no_more(library: Library) -> None:
    assert build() == [library.result]
    first = library.result.stat().st_ino
    assert build() == [library.result]
    assert library.result.stat().st_ino == first
    (library.folder / "answer.cpp").write_text(SOURCE % 43)
    build()
    assert answer(library) == 43


@needs_compiler
def test_of_two_builds_at_once_one_builds(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, compiled = hatch_build._compile, threading.Barrier(2)
    second = threading.Thread(target=build)

    def compiling(*arguments: Any) -> None:
        if not second.ident:
            second.start()
        with suppress(threading.BrokenBarrierError):
            compiled.wait(0.3)  # in vain, unless both compile
            pytest.fail("both compile")
        compile_(*arguments)

    monkeypatch.setattr(hatch_build, "_compile", compiling)
    assert build() == [library.result]
    second.join()
    assert answer(library) == 42


@needs_compiler
def test_a_variant_is_compiled_for_its_instructions_only_where_they_are(library: Library) -> None:
    (library.folder / "answer.cpp").write_text(
        "#ifdef WITH_AVX2\nint wide();\n#else\nint wide() { return 1; }\n#endif\n"
        f"{EXPORT} {{ return wide(); }}\n"
    )
    (library.folder / "answer_avx2.cpp").write_text(
        "#ifndef __AVX2__\n#error\n#endif\nint wide() { return 2; }\n"
    )
    assert build()
    with_avx2 = "avx2" in hatch_build._targets(find_compiler() or [])
    assert answer(library) == (2 if with_avx2 else 1)


@needs_compiler
def test_a_variant_that_the_compiler_cannot_make_is_left_out(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library.folder / "answer_avx2.cpp").write_text("#error never compiled\n")
    monkeypatch.setattr(hatch_build, "TARGETS", {"avx2": ["-mno-such-instructions"]})
    assert build()
    assert answer(library) == 42


def test_without_a_compiler_nothing_fails(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library.result.write_text("of older sources")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() == []
    assert not library.result.exists()
    assert "no C++ compiler" in capsys.readouterr().err


@needs_compiler
def test_what_does_not_compile_is_said_and_removed(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    build()
    (library.folder / "answer.cpp").write_text("#error broken on purpose\n")
    assert build() == []
    assert not library.result.exists()
    assert "broken on purpose" in capsys.readouterr().err
