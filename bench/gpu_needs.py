"""Says what a GPU host's own Python lacks for ``make gpu-test`` and ``make gpu-bench``.

Nothing is installed: such hosts often have no network. Wheels that were brought along can be
unpacked to a folder and named in PYTHONPATH.

Example: PYTHONPATH=./wheels python -m bench.gpu_needs
"""

import importlib.util
import sys

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


def main() -> None:
    """Exits with 2 if anything is missing, in one sentence."""
    if lacking := missing():
        sys.stderr.write(
            f"{sys.executable} lacks {', '.join(lacking)}: install them (see constraints.txt for "
            "versions), or unpack their wheels to a folder and name it in PYTHONPATH.\n"
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
    main()
