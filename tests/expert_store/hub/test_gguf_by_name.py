"""``expertd pack`` of a model in GGUF on a hub."""

from pathlib import Path

import pytest

from expertd_testing.hub import Hub
from expertstore.errors import CheckpointError
from tests.expert_store.hub.test_pack_by_name import run, same
from tests.gguf_files import make_gguf_model, write_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two quantizations, one of them in parts, and a vision part; no config.json."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "Q8_0").mkdir()
    model = make_gguf_model("olmoe", num_hidden_layers=1)
    write_gguf(model, folder / "tiny-BF16.gguf")
    write_gguf(model, folder / "Q8_0/tiny-Q8_0.gguf", split_max_tensors=8)
    (folder / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def repository(files: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path / "packs"))
    hub.repositories["org/tiny-GGUF"] = files
    return files


def test_a_variant_and_a_file(repository: Path, hub: Hub, tmp_path: Path) -> None:
    local = run("pack", repository / "tiny-BF16.gguf", tmp_path / "local", "--scheme", "bf16")
    assert local.exit_code == 0, local.output
    done = run("pack", "org/tiny-GGUF:bf16", "--scheme", "bf16")
    assert done.exit_code == 0, done.output
    packs = tmp_path / "packs"
    assert same(tmp_path / "local", packs / "tiny-GGUF-bf16-bf16")
    part = "Q8_0/tiny-Q8_0-00002-of-00002.gguf"
    done = run("pack", f"hf://org/tiny-GGUF/{part}", "--scheme", "bf16")
    assert done.exit_code == 0, done.output
    assert same(tmp_path / "local", packs / "tiny-Q8_0-bf16")
    assert sorted(packs.iterdir()) == [packs / "tiny-GGUF-bf16-bf16", packs / "tiny-Q8_0-bf16"]
    assert sorted(set(hub.downloads)) == sorted(
        ["tiny-BF16.gguf", part, part.replace("00002-of", "00001-of")]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/tiny-GGUF", "is 2 models in GGUF; name one .*there are tiny-BF16, tiny-Q8_0"),
        ("org/tiny-GGUF:Q4_K_M", "Q4_K_M is no model in GGUF; name one .*tiny-BF16"),
        ("org/tiny:Q4_K_M", "Q4_K_M is no model in GGUF; .*there are none"),
        ("hf://org/tiny-GGUF/m.gguf", "lacks m.gguf; look at the repository's files"),
    ],
)
def test_names_of_no_file(name: str, message: str, repository: Path) -> None:
    del repository
    done = run("pack", name)
    assert isinstance(done.exception, CheckpointError)
    with pytest.raises(CheckpointError, match=message):
        raise done.exception
