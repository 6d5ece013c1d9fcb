"""Numbers that are none go through a worker as they go through torch, and hang nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference import EmbeddedDaemon, load_model
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.settings import DeviceSettings
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest

Make = Callable[..., Any]

POISON = 7
"""A token whose embedding is not a number."""

native = pytest.param(
    "native",
    marks=pytest.mark.skipif(native_library().library is None, reason="no native library"),
)


@contextmanager
def daemon_of(pack: Path, how: str) -> Iterator[tuple[str, Path]]:
    """Name and socket of a model that has half of its experts in RAM."""
    ram = read_manifest(pack).manifest.expert_bytes // 2
    if how == "embedded":
        with EmbeddedDaemon(pack, ram=str(ram)) as embedded:
            yield embedded.name, embedded.socket
    else:
        with serving({"m": pack}, ram=ram) as daemon:
            yield "m", daemon.socket


def logits_of(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits
    return logits


@pytest.mark.parametrize(
    ("architecture", "scheme", "kernels", "how"),
    [
        ("mixtral", "bf16", "reference", "daemon"),
        ("gpt_oss", "bf16", "reference", "embedded"),
        ("deepseek_v3", "bf16", "reference", "daemon"),
        pytest.param("qwen3_moe", "4bit", *native.values, "daemon", marks=native.marks),
        pytest.param("gpt_oss", "4bit", *native.values, "embedded", marks=native.marks),
    ],
)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "infinity"])
def test_what_is_no_number_stays_none(
    architecture: str, scheme: str, kernels: str, how: str, poison: float, packed: Make, stock: Make
) -> None:
    sound, poisoned = [1, 2, 3, 4], [1, POISON, 3, 4]
    with daemon_of(packed(architecture, scheme), how) as (name, socket):
        device = DeviceSettings(speculate_layers=2)
        model = load_model(name, socket=socket, kernels=kernels, device=device)
        expected = logits_of(model, sound)
        assert expected.isfinite().all()
        embedding = stock(architecture).get_input_embeddings().weight.data
        healthy = embedding[POISON].clone()
        embedding[POISON] = model.get_input_embeddings().weight.data[POISON] = poison
        try:
            ours, theirs = (logits_of(each, poisoned) for each in (model, stock(architecture)))
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert ours[0, 1].isnan().all(), "and where it came in, it came out"
            # Nothing of it is left behind: neither in the session nor in a buffer.
            assert torch.equal(logits_of(model, sound), expected)
            text = model.generate(torch.tensor([poisoned]), max_new_tokens=4, do_sample=False)
            assert text.shape[1] <= len(poisoned) + 4
        finally:
            embedding[POISON] = healthy  # other tests have the same model
            model.expertd.close()
