"""What a suite needs: an environment of its own, sources of others, the example model served."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.server import Server, serving_http

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-mixtral"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
)
MODEL = "example"
_FORBIDDEN = "torch==0\n"
"""Constraints of environments: what a suite would bring for gigabytes makes pip fail instead."""


class SuiteError(Exception):
    """A suite could not be run: what, and why."""


@dataclass(frozen=True)
class Outside:
    """Where a suite finds things: its own ``folder`` lies, empty, in one that all suites share.

    ``environments`` may be kept; ``say`` is told what is done.
    """

    folder: Path
    environments: Path
    say: Callable[[str], None]

    @property
    def packed(self) -> Path:
        """The example model as a pack, 4 bits; made when first asked for."""
        path = self.folder.parent / MODEL
        if not path.exists():
            self.say("packing the example model")
            pack(Request(EXAMPLE, path, choose_scheme("4bit")))
        return path

    def served(
        self, *arguments: str | Path, template: Path | None = None
    ) -> AbstractContextManager[Server]:
        """The example model, with a chat template, on a free port."""
        if template is None:
            template = self.folder / "chat.jinja"
            template.write_text(TEMPLATE)
        return serving_http("--embedded", self.packed, "--chat-template", template, *arguments)

    def python(self, name: str, packages: Sequence[str]) -> Path:
        """The interpreter of an environment that has ``packages``. Raises SuiteError."""
        root = self.environments / name
        python, mark = root / "bin/python", root / "installed.txt"
        wanted = "\n".join(packages)
        if mark.exists() and mark.read_text() == wanted:
            return python
        self.say(f"installing {', '.join(packages)}")
        constraints = self.folder / "constraints.txt"
        constraints.write_text(_FORBIDDEN)
        self.run([sys.executable, "-m", "venv", root])
        asked = ["install", "--quiet", "--disable-pip-version-check", "-c", constraints]
        self.run([python, "-m", "pip", *asked, *packages])
        mark.write_text(wanted)
        return python

    def source(self, package: str, version: str, sdist: Path | None) -> Path:
        """The unpacked source distribution: ``sdist``, or the package index's. Raises SuiteError.

        It is not built: its tests are all that is wanted.
        """
        if sdist is None:
            self.say(f"fetching the source distribution of {package} {version}")
            asked = ["download", "--quiet", "--no-deps", "--no-binary", package]
            self.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    *asked,
                    "--dest",
                    self.folder,
                    f"{package}=={version}",
                ]
            )
            sdist = next(self.folder.glob(f"{package.replace('-', '?')}-{version}.tar.gz"))
        folder = self.folder / f"{package}-source"
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        return next(path for path in folder.iterdir() if path.is_dir())

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        seconds: float = 1800,
    ) -> str:
        """What ``command`` prints, with ``environment`` beside the own. Raises SuiteError."""
        done = self.run_tests(command, cwd=cwd, environment=environment, seconds=seconds)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-2000:]
            raise SuiteError(f"{command[0]} ended with {done.returncode}: {said}")
        return done.stdout

    def run_tests(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        seconds: float = 1800,
    ) -> subprocess.CompletedProcess[str]:
        """The same for a command whose exit code says that tests failed."""
        try:
            return subprocess.run(
                [str(part) for part in command],
                cwd=cwd or self.folder,
                env={**os.environ, **(environment or {})},
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise SuiteError(f"{command[0]} took more than {seconds:g} s.") from error
