"""Names of models on hubs."""

import pytest

from expertd.hub.reference import HubReference, parse_reference
from expertstore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", HubReference("hf", "org/name")),
        ("Qwen/Qwen3-30B-A3B@v1.0", HubReference("hf", "Qwen/Qwen3-30B-A3B", "v1.0")),
        ("hf://org/name@refs/pr/1", HubReference("hf", "org/name", "refs/pr/1")),
        ("ms://org/name", HubReference("ms", "org/name")),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("name", None),
        ("org/name/", None),
        ("org/a/b", None),
        ("~/org", None),
    ],
)
def test_names(text: str, reference: HubReference | None) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://org/name", "is on no hub that is known; give hf://"),
        ("hf://name", "names no model; give hf://ORG/NAME"),
        ("hf://org/name@", "names no model"),
        ("https://huggingface.co/org/name", "names no model"),
    ],
)
def test_broken_names(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_reference(text)


def test_as_it_is_said() -> None:
    reference = HubReference("hf", "org/name", "v1")
    assert str(reference) == "hf://org/name@v1"
    assert reference.model == "name"


@pytest.mark.parametrize(
    ("text", "reference", "model"),
    [
        ("org/n:Q4_K_M", HubReference("hf", "org/n", None, "", "Q4_K_M"), "n-Q4_K_M"),
        ("hf://org/n/q4/m-00001-of-00002.gguf@v1",
         HubReference("hf", "org/n", "v1", "q4/m-00001-of-00002.gguf"), "m"),
        ("ms://org/n/m-Q8_0.gguf", HubReference("ms", "org/n", None, "m-Q8_0.gguf"), "m-Q8_0"),
    ],
)  # fmt: skip
def test_files_in_gguf(text: str, reference: HubReference, model: str) -> None:
    assert parse_reference(text) == reference
    assert reference.model == model
    assert parse_reference(str(reference)) == reference
    assert parse_reference("models/m.gguf") is None, "a file on this host that is not there"
