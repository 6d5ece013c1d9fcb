"""A long prompt with a budget far below the model: each layer's experts are read once, in order."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import expertd_inference.experts.cpu as experts_module
from expertd_inference import load_model
from expertd_inference.settings import DeviceSettings
from expertd_testing.daemon import serving
from expertstore.pack.manifest import Manifest, read_manifest

Make = Callable[..., Any]
EXAMPLE = Path(__file__).parents[3] / "examples/tiny-mixtral"


def places(manifest: Manifest) -> list[tuple[str, int]]:
    """File and offset of every record, in the manifest's order: layer by layer."""
    return [
        (manifest.files[file].name, offset)
        for layer in manifest.layers
        for file, offset in zip(layer.files, layer.offsets, strict=True)
    ]


@pytest.mark.parametrize(
    ("share", "slot_bytes", "layers_ahead"),
    [
        pytest.param(0.25, experts_module.MAX_SLOT_BYTES, 0, id="at once"),
        pytest.param(0.25, 40_000, 0, id="in many blocks"),
        pytest.param(0.25, 40_000, 1, id="no room for hints"),
        pytest.param(0.5, 40_000, 1, id="with hints"),
    ],
)
def test_one_long_prompt_reads_each_record_once_in_the_order_of_the_files(
    share: float,
    slot_bytes: int,
    layers_ahead: int,
    packed: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts_module, "MAX_SLOT_BYTES", slot_bytes)
    pack = packed("example")
    manifest = read_manifest(pack).manifest
    tokens = AutoTokenizer.from_pretrained(EXAMPLE)(
        (EXAMPLE / "heldout.txt").read_text()[4000:6400]
    ).input_ids[:600]
    log, config = tmp_path / "reads", tmp_path / "config.toml"
    config.write_text("loader_threads = 1\nscrub_bytes_per_second = 0\n")  # one after the other
    with serving(
        {"m": pack},
        ram=int(share * manifest.expert_bytes),
        config=config,
        arguments=["--disk-io", "direct"],
        environment={"READS": str(log)},
        module="tests.inference.watched_daemon",
    ) as daemon:
        device = DeviceSettings(speculate_layers=layers_ahead)
        model = load_model("m", socket=daemon.socket, device=device)
        with torch.no_grad():
            model(torch.tensor([tokens]))
        hinted = model.expertd.hint_stats
        model.expertd.close()
    lines = [line.split() for line in log.read_text().splitlines()]
    reads = [(name, int(offset)) for name, offset in lines]
    order = {place: number for number, place in enumerate(places(manifest))}
    assert max(Counter(reads).values()) == 1
    if share < 0.5:
        assert [order[place] for place in reads] == sorted(order[place] for place in reads)
    else:
        assert hinted is not None
        assert hinted.useful > 0
    assert len(reads) > 0.9 * len(order), "so long a prompt uses nearly all"
