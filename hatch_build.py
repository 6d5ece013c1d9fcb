"""Builds the native libraries: as hatchling's build hook, or alone, in place.

Alone it needs nothing but Python and a C++17 compiler::

    python hatch_build.py            # what is out of date; --force: everything

A library is all ``*.cpp`` of its folder, and its result lies beside them. A source whose name
ends in that of a target, as in ``multiply_avx2.cpp``, is compiled for that instruction set and
only where compiler and architecture have it; ``WITH_AVX2`` then tells the others that it is
there. What the processor has is asked at run time, so one build runs on all of an architecture.

Without a compiler nothing is built and the install goes on: the torch reference runs instead.
``CXX`` and ``CXXFLAGS`` are obeyed, the first as a command with arguments.
"""

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface as _Hook
    from hatchling.metadata.plugin.interface import MetadataHookInterface as _MetadataHook
except ModuleNotFoundError:  # run alone
    _Hook = _MetadataHook = object

ROOT = Path(__file__).resolve().parent

# No fast-math, and products are fused with sums only where the source says so: NaN must pass,
# and how a result is rounded is part of it.
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off",
    "-pthread",
]  # fmt: skip
WARNINGS = ["-Wall", "-Wextra"]
# Where products and sums can be fused, they are: always the same ones, so a result stays a result.
_FUSED = ["-ffp-contract=fast"]
TARGETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", *_FUSED],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mbmi2",
        *_FUSED,
    ],
    "avx512vnni": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c",
        "-mbmi2",
        *_FUSED,
    ],
    "avx512bf16": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vbmi2",
        "-mavx512bf16", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2",
        *_FUSED,
    ],
}  # fmt: skip
TARGET_MACHINES = {"x86_64", "AMD64"}


@dataclass(frozen=True)
class Library:
    """``folder`` holds the sources and gets ``name``."""

    folder: Path
    name: str

    @property
    def result(self) -> Path:
        """The shared object."""
        return self.folder / self.name

    @property
    def sources(self) -> list[Path]:
        """What is compiled, each on its own."""
        return sorted(self.folder.glob("*.cpp"))

    @property
    def headers(self) -> list[Path]:
        """What the sources may include: of their folder, and what all libraries share."""
        return sorted([*self.folder.glob("*.h"), *(INCLUDED / "expertstore/cpp").glob("*.h")])


INCLUDED = ROOT / "proto"


LIBRARIES = (
    Library(ROOT / "expert_store/expertd/native", "libexpertd_packing.so"),
    Library(ROOT / "inference/expertd_inference/kernels/native", "libexpertd_kernels.so"),
)


def build(*, force: bool = False) -> list[Path]:
    """Builds what is out of date, or with ``force`` everything; what is there afterwards.

    Says on stderr what could not be built, and does not raise for it. A library that could
    not be built again is removed: one of older sources would be worse than none.
    """
    compiler = find_compiler()
    if compiler is None:
        _say("no C++ compiler (c++, g++ or clang++, or CXX): expertd will use the slow reference")
        for library in LIBRARIES:
            library.result.unlink(missing_ok=True)
        return []
    done = []
    for library in LIBRARIES:
        with _alone(library):
            if _build(library, compiler, force=force):
                done.append(library.result)
    return done


def find_compiler() -> list[str] | None:
    """The command of ``CXX``, or the first compiler in PATH; None if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


@contextmanager
def _alone(library: Library) -> Iterator[None]:
    """A second build at the same time waits, and finds what the first has built."""
    folder = os.open(library.folder, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _build(library: Library, compiler: list[str], *, force: bool) -> bool:
    if not library.sources:
        library.result.unlink(missing_ok=True)
        return False
    targets = _targets(compiler)
    key = _key(library, compiler, targets)
    stamp = library.result.with_suffix(".stamp")
    if not force and library.result.exists() and stamp.exists() and stamp.read_text() == key:
        return True
    stamp.unlink(missing_ok=True)
    try:
        _compile(library, compiler, targets)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _say(f"{library.name} was not built, expertd will use the slow reference:\n{output}")
        library.result.unlink(missing_ok=True)
        return False
    stamp.write_text(key)
    return True


def _compile(library: Library, compiler: list[str], targets: dict[str, list[str]]) -> None:
    """Raises CalledProcessError if the compiler refuses."""
    command = [*compiler, *FLAGS, *WARNINGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    sources = [s for s in library.sources if (t := _target_of(s)) is None or t in targets]
    present = {target for source in sources if (target := _target_of(source))}
    command += [f"-DWITH_{target.upper()}" for target in sorted(present)]
    command.append(f"-I{INCLUDED}")
    with tempfile.TemporaryDirectory(prefix="expertd-native-") as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, result: Path) -> None:
            flags = targets.get(_target_of(source) or "", [])
            _run([*command, *flags, "-c", str(source), "-o", str(result)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(folder) / library.name
        _run([*command, "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(linked)])
        # A process that has the old library mapped keeps it: the new one is another file.
        beside = library.result.with_name(f".{library.name}.{os.getpid()}")
        shutil.copy(linked, beside)
        beside.replace(library.result)


def _targets(compiler: list[str]) -> dict[str, list[str]]:
    """The instruction sets that this compiler can compile for."""
    if platform.machine() not in TARGET_MACHINES:
        return {}
    return {name: flags for name, flags in TARGETS.items() if _accepts(compiler, flags)}


def _accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def _target_of(source: Path) -> str | None:
    ending = source.stem.rpartition("_")[2]
    return ending if ending in TARGETS else None


def _key(library: Library, compiler: list[str], targets: dict[str, list[str]]) -> str:
    """What the result depends on, as a hash."""
    version = _run([*compiler, "--version"])
    flags = [*FLAGS, os.environ.get("CXXFLAGS", "")]
    digest = hashlib.sha256(repr((version, compiler, flags, targets)).encode())
    for file in sorted([Path(__file__), *library.sources, *library.headers]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _say(message: str) -> None:
    sys.stderr.write(f"hatch_build.py: {message}\n")


class CustomBuildHook(_Hook):  # type: ignore[misc, valid-type] # object where hatchling is not
    """What hatchling calls before it makes a wheel, or an editable install, which is one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, and makes the wheel one of this architecture if there was anything to build."""
        if self.target_name != "wheel":
            return
        results = build()
        if results:
            build_data["artifacts"] += [f"/{path.relative_to(ROOT)}" for path in results]
            build_data["pure_python"] = False
            # No Python header is used, so the interpreter's version does not matter.
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        if version == "standard":  # an editable install finds them in the checkout
            deploy = ROOT / "deploy"
            for file in sorted(deploy.rglob("*")):
                if file.is_file() and file.name != "check":
                    place = file.relative_to(ROOT)
                    build_data["force_include"][str(file)] = f"expertd/{place}"


def readme_of_the_package(text: str, repository: str | None) -> str:
    """README.md as a package index shows it, where a relative link would lead nowhere.

    Such links lead into ``repository``, a URL, if there is one; else their text stays and the
    images are left out.
    """

    def link(match: re.Match[str]) -> str:
        image, words, target = match[1], match[2], match[3]
        if "://" in target or target.startswith("#"):
            return match[0]
        if repository is None:
            return "" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


class CustomMetadataHook(_MetadataHook):  # type: ignore[misc, valid-type]
    """What hatchling calls for the package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README."""
        repository = metadata.get("urls", {}).get("Repository")
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readme_of_the_package(text, repository),
        }


if __name__ == "__main__":
    built = build(force="--force" in sys.argv[1:])
    sys.stdout.write("".join(f"{path.relative_to(ROOT)}\n" for path in built))
