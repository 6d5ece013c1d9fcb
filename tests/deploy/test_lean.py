"""The daemon runs where only deploy/requirements.txt is installed."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertd_testing.watching import assert_serves

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "deploy/requirements.txt"
CHECKPOINT = ROOT / "examples/tiny-mixtral"
# Finds no module of what a daemon's host need not have, as if it were not installed.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def needed() -> set[str]:
    """Distributions that deploy/requirements.txt installs, with theirs in turn."""
    names: set[str] = set()
    queue = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    while queue:
        name = re.split(r"[^\w.-]", queue.pop())[0].lower().replace("_", "-")
        if name not in names:
            names.add(name)
            with suppress(PackageNotFoundError):  # wanted on other platforms only
                queue += [each for each in requires(name) or () if "extra ==" not in each]
    return names


@pytest.fixture
def lean(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds only what is needed."""
    installed = needed() | {"expertd", "setuptools"}
    hidden = {
        module
        for module, distributions in packages_distributions().items()
        if not any(each.lower().replace("_", "-") in installed for each in distributions)
    }
    assert {"torch", "transformers"} <= hidden
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return make_pack(tmp_path / "pack")


def test_serves_packs_without_torch(lean: dict[str, str], pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB", environment=lean) as daemon:
        assert_serves(daemon.socket)
        for command in (["stats"], ["models"]):
            done = run(lean, *command, "--socket", daemon.socket)
            assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    # A handmade pack has no trunk: that is all that is found.
    assert "1 damages found" in run(lean, "verify", pack).stdout
    assert "trunk.safetensors cannot be used" in run(lean, "inspect", pack).stderr


# Refused once everything is imported.
THREADS = """
import os, sys
from expertd.cli import main
sys.argv = ["expertd", "serve", "--config", "/nowhere.toml"]
try:
    main()
except SystemExit:
    print(len(os.listdir("/proc/self/task")), "numpy" in sys.modules)
"""


def test_numpy_starts_no_threads(lean: dict[str, str]) -> None:
    """Its BLAS, which the daemon never calls, would have one and 32 MiB for each core."""
    environment = {**os.environ, **lean}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True, text=True, timeout=30, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_packing_says_what_is_missing(lean: dict[str, str], tmp_path: Path) -> None:
    done = run(lean, "pack", CHECKPOINT, tmp_path / "new")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "not installed" in done.stderr


def test_working_says_what_is_missing(lean: dict[str, str], pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon:
        asked = ("generate", "--socket", daemon.socket, "--model", "m", "--prompt", "Once")
        done = run(lean, *asked, package="expertd_inference")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "not installed" in done.stderr


def run(
    environment: dict[str, str], *arguments: object, package: str = "expertd"
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", f"from {package}.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **environment},
    )
