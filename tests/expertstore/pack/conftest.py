from pathlib import Path

import pytest

from expertd_testing.handmade import PAGE, make_pack
from expertstore.pack.tensor_file import build_header

LAYERS, EXPERTS, RECORD_BYTES = 2, 4, 2 * PAGE


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """2 layers of 4 experts, random bytes, with the safetensors header of a real pack."""
    path = make_pack(tmp_path / "pack", layers=LAYERS, experts=EXPERTS, record_bytes=RECORD_BYTES)
    header = build_header(
        [
            (f"layers.{layer}.experts.{expert}", "U8", (RECORD_BYTES,))
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        ]
    )
    assert len(header) == PAGE
    with (path / "experts-00000.safetensors").open("r+b") as file:
        file.write(header)
    return path
