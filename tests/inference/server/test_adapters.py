"""An adapter is asked for as a model, beside its base."""

from pathlib import Path
from typing import Any

import httpx2

from expertd_testing.adapters import make_adapter
from expertd_testing.server import Server
from expertstore.adapter_shelf import load_adapter, unload_adapter
from tests.inference.conftest import Make

ASKED = {"prompt": "def read_lines(path):", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def answer(http: httpx2.Client, model: str, **fields: Any) -> httpx2.Response:
    return http.post("/v1/completions", json={**ASKED, "model": model, **fields})


def text(http: httpx2.Client, model: str) -> str:
    response = answer(http, model)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    said: str = response.json()["choices"][0]["text"]
    return said


def test_an_adapter_by_its_name(
    server: Server, http: httpx2.Client, packed: Make, tmp_path: Path
) -> None:
    base = text(http, "example")
    shapes = {f"model.layers.{n}.self_attn.{m}_proj": (256, 256) for n in range(6) for m in "qo"}
    pack = packed("example", "4bit")
    said = {}
    for name, seed in (("one", 1), ("two", 2)):
        source = make_adapter(tmp_path / name, shapes, seed=seed)
        load_adapter(server.adapters, name, source, "example", pack)
        said[name] = text(http, name)
    assert len({base, *said.values()}) == 3
    assert text(http, "example") == base, "no prefix is shared, and the base is as it was"
    assert text(http, "one") == said["one"]
    models = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
    assert models["two"]["root"] == models["two"]["parent"] == "example"
    wrong = make_adapter(tmp_path / "wrong", {"model.layers.0.mlp.router": (8, 256)})
    load_adapter(server.adapters, "two", wrong, "example", pack)
    refused = answer(http, "two")
    assert refused.status_code == 400
    assert "which is no linear layer of this model" in refused.json()["error"]["message"]
    for name in said:
        unload_adapter(server.adapters, name)
        assert answer(http, name).status_code == 404
