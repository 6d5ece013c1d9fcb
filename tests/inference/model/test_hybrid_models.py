"""Models with recurrent layers load and decode with native kernels, from quantized packs."""

from pathlib import Path

import pytest
import torch

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_inference import GenerationSettings, Worker
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertd_testing.tiny_models import save_model
from tests.architectures.batches import batched_model

pytestmark = pytest.mark.skipif(
    native_library().library is None, reason="native code is not built here"
)


# A norm with a gate; attention and a norm of the model's own file.
@pytest.mark.parametrize("architecture", ["qwen3_next", "granitemoehybrid"])
def test_it_decodes(architecture: str, tmp_path: Path) -> None:
    save_model(batched_model(architecture).to(torch.bfloat16), tmp_path / "model")
    pack(Request(tmp_path / "model", tmp_path / "pack", SCHEMES["4bit"]))
    settings = GenerationSettings(max_new_tokens=4, ignore_eos=True)
    with (
        serving({"m": tmp_path / "pack"}) as daemon,
        Worker(attach("m", daemon.socket), say=lambda _: None) as worker,
    ):
        streams = [worker.engine.submit([1, 2, 3, 4 + n], settings) for n in range(2)]
        assert [len(list(stream)) for stream in streams] == [4, 4]
        assert worker.engine.executor == "modules"
