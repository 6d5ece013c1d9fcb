import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.usable_cuda import is_cuda_usable

if not is_cuda_usable():
    # Triton decides when it is imported, by whomever, whether its kernels are compiled or
    # interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

with suppress(ModuleNotFoundError):  # a GPU host's Python need not have it
    from hypothesis import settings

    # One example may take long on a busy machine, and that says nothing about the code.
    settings.register_profile("expertd", deadline=None)
    settings.load_profile("expertd")

HERE = Path(__file__).parent
LONG = {
    HERE / "campaign/test_campaign.py",
    HERE / "inference/engine/test_same_text.py",
    HERE / "inference/kernels/gpu/test_triton_compiles.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole programs first: what processes take from one another at the end is then short."""
    items.sort(key=lambda item: item.path.parent != HERE and item.path not in LONG)
