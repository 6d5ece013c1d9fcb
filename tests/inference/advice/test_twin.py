"""The twin has the model's structure and none of its size, and really generates."""

from pathlib import Path

import pytest

from expertd.packing.shapes import SHAPES, shape_config
from expertd.packing.synthetic import make_pack
from expertd_inference.advice import twin
from expertd_inference.advice.models import find_model


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_twin(name: str, tmp_path: Path) -> None:
    config = shape_config(name, published=True)
    # Embeddings of all tokens would take a second to write.
    narrow = {**twin.twin_config(config), "vocab_size": 512}
    pack = make_pack(tmp_path / "twin", narrow, twin.SCHEME, distinct_records=1)
    (need,) = find_model(str(pack)).needs
    real = find_model(name).needs[0]
    assert {group.top_k for group in need.experts} == {group.top_k for group in real.experts}
    if config["num_hidden_layers"] <= twin.MAX_LAYERS:
        assert need.num_layers == real.num_layers
    assert need.token_bytes < real.token_bytes / 10
    assert need.expert_bytes < 256 << 20


def test_the_twin_is_run() -> None:
    said: list[str] = []
    config = {**shape_config("olmoe-1b-7b"), "num_hidden_layers": 2, "vocab_size": 512}
    found = twin.measure_twin(config, said.append)
    assert found.token_seconds > 0
    assert found.call_seconds > 0
    assert found.worker_bytes > 1 << 20
    assert found.need.num_layers == 2
    assert found.layer_scale == 1
    assert not said


def test_a_model_without_a_twin_has_another_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(config: dict[str, object]) -> str:
        asked.append(str(config["model_type"]))
        if config["model_type"] == "odd":
            raise ValueError("heads do not fit\nand more")
        assert config["num_hidden_layers"] == 7
        return "measured"

    monkeypatch.setattr(twin, "_measure", measure)
    said: list[str] = []
    found: object = twin.measure_twin({"model_type": "odd", "num_hidden_layers": 7}, said.append)
    assert found == "measured"
    assert asked == ["odd", "qwen3_moe"]
    assert len(said) == 1
    assert "heads do not fit" in said[0]
    assert "and more" not in said[0]
