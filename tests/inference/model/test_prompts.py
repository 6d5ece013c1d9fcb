"""Prompts that cannot become tokens of the model are refused in a sentence that says why."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import MixtralConfig

from expertd_inference.model.prompts import encode
from expertd_inference.model.tokenizer import load_tokenizer
from expertd_testing.tiny_models import VOCAB, byte_tokenizer
from expertstore.errors import InvalidInputError, PackError


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def model_of(rows: int = VOCAB) -> Any:
    return SimpleNamespace(
        get_input_embeddings=lambda: nn.Embedding(rows, 1),
        config=MixtralConfig(max_position_embeddings=64),
        name_or_path="/packs/tiny",
    )


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path)
    MixtralConfig().save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tried(pack: Path) -> str | None:
    """What loading its tokenizer says; None if there is nothing wrong for transformers."""
    try:
        load_tokenizer(pack)("x")
    except PackError as error:
        return str(error)
    return None


def test_a_tokenizer_of_another_version(pack: Path) -> None:
    edit(pack / "tokenizer.json", pre_tokenizer={"type": "SplitOfTheFuture"})
    with pytest.raises(PackError, match=r"no usable tokenizer for transformers .* newer"):
        load_tokenizer(pack)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"x": 1}]}'),
        ("config.json", '{"model_type": "mixtral", "auto_map": 5}'),
    ],
)
def test_damaged_files(pack: Path, file: str, text: str) -> None:
    (pack / file).write_text(text)
    said = tried(pack)
    assert said is None or "no usable tokenizer" in said
    assert "\n" not in (said or "")


def test_none_at_all(tmp_path: Path) -> None:
    MixtralConfig().save_pretrained(tmp_path)
    with pytest.raises(PackError, match=r"none of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_code_of_a_pack_is_not_asked_for(pack: Path) -> None:
    edit(pack / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]},
         tokenizer_class="Y")  # fmt: skip
    shutil.copy(pack / "tokenizer.json", pack / "x.py")
    said = tried(pack)
    assert said is None or "no usable tokenizer" in said


def template(text: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"tool_use": "x"}, "default"),
        ("{{ raise_exception('system message required') }}", "system message required"),
        ("{% for m in messages %}{{ m.content", "unexpected end of template"),
        ("{{ messages[7].content.x }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ tools | length }}", "has no len"),
        ("{{ date_string + '.' }}", "date_string"),
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "range"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages[0].content | nope }}", "nope"),
    ],
)
def test_templates_that_do_not_take_it(text: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match="chat template of /packs/tiny") as caught:
        encode(model_of(), template(text), user("Hello"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_that_make_nothing() -> None:
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        encode(model_of(), template("{% if messages|length > 3 %}x{% endif %}"), user("x"))
    with pytest.raises(InvalidInputError, match="model tiny has no chat template"):
        encode(model_of(), byte_tokenizer(), user("x"))


def test_templates_of_which_one_is_the_default() -> None:
    tokenizer = template({"default": "{{ messages[0].content }}!", "tool_use": "x"})
    tokens = encode(model_of(), tokenizer, user("Hi"))
    assert tokenizer.decode(tokens) == "Hi!"


def test_tokens_beyond_the_embeddings() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        InvalidInputError, match=rf"token {VOCAB} \('<new>'\).*for 0 to {VOCAB - 1}"
    ):
        encode(model_of(), tokenizer, "hello <new> world")
    # The other way round is usual: embeddings are padded to a round number.
    assert max(encode(model_of(VOCAB + 7), tokenizer, "hello <new>")) == VOCAB


@pytest.mark.parametrize("ids", [[-1, 3], [3, -100]])
def test_tokens_below_them(ids: list[int]) -> None:
    class Odd:
        chat_template = None

        def __call__(self, text: str) -> Any:
            return SimpleNamespace(input_ids=ids)

        def convert_ids_to_tokens(self, token: int) -> str | None:
            raise OverflowError("can't convert negative int to unsigned")

    with pytest.raises(InvalidInputError, match=f"has token {min(ids)} "):
        encode(model_of(), Odd(), "x")


def test_a_tokenizer_that_fails() -> None:
    def fails(text: str) -> Any:
        raise Exception("no such merge")

    with pytest.raises(PackError, match="tokenizer of /packs/tiny fails: no such merge"):
        encode(model_of(), fails, "x")


def test_bytes_that_are_no_text() -> None:
    prompt = b"caf\xe9".decode(errors="surrogateescape")
    with pytest.raises(InvalidInputError, match=r"not UTF-8 text.*character 3"):
        encode(model_of(), byte_tokenizer(), prompt)


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"content": "Hi"}, {"role": "user", "content": ["Hi"]}, 3]
)
def test_messages_that_are_none(message: Any) -> None:
    with pytest.raises(InvalidInputError, match="A message of a chat has a role and its content"):
        encode(model_of(), template("x"), [*user("Hi"), message])


def test_messages_of_several_speakers() -> None:
    said = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    tokens = encode(model_of(), template(said), messages)
    assert byte_tokenizer().decode(tokens) == "system:Be brief.;user:Hi;"
    refuses = template("{{ raise_exception('no') }}")
    with pytest.raises(InvalidInputError, match="does not take messages of system, user: no;"):
        encode(model_of(), refuses, messages)
    with pytest.raises(InvalidInputError, match="not UTF-8"):
        encode(model_of(), template(said), user("\udce9"))
