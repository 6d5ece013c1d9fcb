"""Says what a GPU host's own Python lacks for ``make gpu-test``, ``gpu-bench`` and ``gpu-slot``.

Such hosts often have no network. Wheels that were brought along in ``.whl`` are installed into
``build/gpu-site``, which the three commands put before the host's own packages; the host's Python
stays as it is. To bring them, where there is a network, for Python 3.12:

pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
  msgspec==0.22.0 grpcio==1.81.2 grpcio-health-checking==1.81.1 grpcio-reflection==1.81.1
  protobuf==6.33.6

Example: python -m bench.gpu_needs
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS, SITE = ROOT / ".whl", ROOT / "build/gpu-site"
NEEDED = {
    "torch": "torch, built for CUDA",
    "triton": "triton",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "msgspec": "msgspec",
    "xxhash": "xxhash",
    "uvloop": "uvloop",
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "prometheus_client": "prometheus-client",
    "typer": "typer",
    "rich": "rich",
    "pytest": "pytest",
}
"""Distributions by the module that shows that they are there."""


def missing() -> list[str]:
    """The distributions that are not there."""
    return [name for module, name in NEEDED.items() if not _is_there(module)]


def install(wheels: Path = WHEELS, site: Path = SITE) -> None:
    """Installs all of ``wheels`` into the folder ``site``, unless it has them.

    Raises subprocess.CalledProcessError if pip cannot: it has said why.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        return
    # Names alone: a copy of a wheel keeps no time that could be compared.
    names = "\n".join(wheel.name for wheel in found)
    stamp = site / "wheels.txt"
    if stamp.exists() and stamp.read_text() == names:
        return
    site.parent.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix="gpu-site-", dir=site.parent))
    try:
        # It lacks dependencies that the host has, so none are looked for.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(target)]
        subprocess.run([*command, *map(str, found)], check=True)
        (target / stamp.name).write_text(names)
        shutil.rmtree(site, ignore_errors=True)
        target.rename(site)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    importlib.invalidate_caches()


def main() -> None:
    """Exits with 2 if anything is missing, in one sentence."""
    try:
        install()
    except subprocess.CalledProcessError:
        sys.stderr.write(
            f"The wheels in {WHEELS} do not fit {sys.executable}; bring those for its version "
            "(python -m bench.gpu_needs --help has the command), or remove them.\n"
        )
        sys.exit(2)
    if lacking := missing():
        sys.stderr.write(
            f"{sys.executable} lacks {', '.join(lacking)}: install them (see constraints.txt for "
            f"versions), or bring their wheels in {WHEELS}.\n"
        )
        sys.exit(2)
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write(
            f"torch {torch.__version__} sees no CUDA device here; look at nvidia-smi, or name "
            "another Python with make PYTHON=...\n"
        )
        sys.exit(2)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.stdout.write(__doc__ or "")
    else:
        main()
