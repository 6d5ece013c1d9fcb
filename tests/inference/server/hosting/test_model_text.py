import asyncio
import copy
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from expertd_inference.server.front import LONG_BYTES
from expertd_inference.server.hosting.model_text import (
    GENERATION_CONFIG,
    ModelText,
    _wished_temperature,
)
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_client
from expertstore.errors import InvalidInputError, PackError
from tests.inference.conftest import Make

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def text(packed: Make) -> ModelText:
    return ModelText("example", packed("example", "4bit"), TEMPLATE)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("given", ["", " ", "def f(x):\n", "a€ 😀", "x" * 3000, "SPECIAL"])
def test_tokens_are_the_tokenizer_s_own(text: ModelText, given: str, special: bool) -> None:
    given = given.replace("SPECIAL", "a" + "".join(text.special_tokens.values()) + "b")
    own = text.tokenizer(given, add_special_tokens=special).input_ids
    assert text.encode(given, special=special) == own


def test_a_tokenizer_that_is_slow_or_fails(text: ModelText) -> None:
    slow = copy.copy(text)
    slow._fast = None
    assert slow.encode("def f") == text.encode("def f")
    slow.tokenizer = None
    with pytest.raises(PackError, match=r"tokenizer of example fails: .*; copy its files again"):
        slow.encode("def f")


def test_without_a_template_there_are_no_chats(text: ModelText) -> None:
    with pytest.raises(InvalidInputError, match="The model example has no chat template"):
        text.in_format("", None).render([{"role": "user", "content": "x"}])


def test_bytes_of_tokens(text: ModelText) -> None:
    names = {0: None, 1: "<0xE2>", 2: "\u0120a", 3: "é€", 4: "\u0120€"}
    spelled = copy.copy(text)
    spelled.tokenizer = SimpleNamespace(
        convert_ids_to_tokens=names.get, decode=lambda ids, **_: f"[{names[ids[0]]}]"
    )
    spelled._byte_of_character = {"\u0120": 32, "a": 97, "é": 233}
    found = [spelled.token_bytes(token) for token in names]
    assert found == [b"", b"\xe2", b" a", "[é€]".encode(), "[\u0120€]".encode()]


@pytest.mark.parametrize(
    ("said", "temperature"),
    [
        ('{"temperature": 0.5}', 0.5),
        ('{"temperature": 0}', 0.0),
        ('{"temperature": -1}', 1.0),
        ('{"temperature": "hot"}', 1.0),
        ("{}", 1.0),
        ("[]", 1.0),
        ("{", 1.0),
        (None, 1.0),
    ],
)
def test_the_temperature_that_a_pack_wishes(
    tmp_path: Path, said: str | None, temperature: float
) -> None:
    if said is not None:
        (tmp_path / GENERATION_CONFIG).write_text(said)
    assert _wished_temperature(tmp_path) == temperature


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_or_leaves_its_sandbox_is_the_user_s_error(
    text: ModelText, template: str
) -> None:
    with pytest.raises(InvalidInputError, match="does not take these messages"):
        text.render([{"role": "user", "content": "x"}], template=template)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "long"}]}),
        ("/v1/completions", {"prompt": "long"}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "long"}]}),
        ("/api/generate", {"model": "recited", "prompt": "long", "raw": True, "stream": False}),
        ("/tokenize", {"prompt": "long"}),
        ("/tokenize", {"content": "long"}),
    ],
)
async def test_a_long_prompt_delays_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object]
) -> None:
    make_tokenizer(tmp_path)
    model = RecitedModel(ModelText("recited", tmp_path, TEMPLATE))
    model.recitals.append("Yes.")
    began, may_go_on = threading.Event(), threading.Event()
    encode = model.text.encode

    def slowly(asked: str, *, special: bool = True) -> list[int]:
        began.set()
        assert may_go_on.wait(30)
        return encode(asked, special=special)

    monkeypatch.setattr(model.text, "encode", slowly)
    async with reciting_client(tmp_path, model) as client:
        asking = asyncio.create_task(client.post(path, json=body))
        assert await asyncio.to_thread(began.wait, 30)
        assert (await client.get("/health")).status_code == 200
        may_go_on.set()
        assert (await asking).status_code == 200


async def test_long_prompts_are_prepared_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(tmp_path)
    model = RecitedModel(ModelText("recited", tmp_path, TEMPLATE))
    began, may_go_on = threading.Semaphore(0), threading.Event()
    encode = model.text.encode

    def slowly(asked: str, *, special: bool = True) -> list[int]:
        if len(asked) > LONG_BYTES:
            began.release()
            assert may_go_on.wait(HANG_SECONDS)
        return encode(asked, special=special)

    monkeypatch.setattr(model.text, "encode", slowly)
    long = {"prompt": "a" * (LONG_BYTES + 1)}
    async with reciting_client(tmp_path, model) as client:
        asking = [asyncio.create_task(client.post("/tokenize", json=long)) for _ in range(8)]
        assert await asyncio.to_thread(began.acquire, timeout=HANG_SECONDS)
        # Threads that wait for their turn would be all that there are.
        short = await asyncio.wait_for(client.post("/tokenize", json={"prompt": "a"}), HANG_SECONDS)
        assert short.json()["count"] == 1
        assert not began.acquire(blocking=False)
        may_go_on.set()
        counts = [(await one).json()["count"] for one in asking]
        assert counts == [LONG_BYTES + 1] * 8
