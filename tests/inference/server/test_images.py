"""Images in requests of all interfaces: what the engine is given, and what is refused."""

import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from expertd_inference.images import MAX_BYTES, MAX_IMAGES
from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_client
from expertd_testing.tiny_seeing import TEMPLATE, picture

PNG, JPEG = picture(20, 30), picture(40, 10, form="JPEG")
CHAT, OLLAMA = "/v1/chat/completions", "/api/chat"


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"


def part(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def chat(*addresses: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "look"}, *map(part, addresses)]
    return {"messages": [{"role": "user", "content": content}]}


def bomb(width: int, height: int) -> bytes:
    """The file of a white picture that is small itself."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


class Asked(NamedTuple):
    model: RecitedModel
    client: httpx2.AsyncClient

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of the answer."""
        self.model.recitals.append("yes")
        response = await self.client.post(path, json={"model": "recited", **body})
        return response.status_code, response.text


def make_pack(directory: Path, *, sees: bool) -> Path:
    make_tokenizer(directory, "<|image|>", "<|begin|>", "<|end of image|>")
    config = {"model_type": "qwen3_vl_moe", "image_token_id": 257}
    (directory / "config.json").write_text(json.dumps(config))
    if sees:
        (directory / "preprocessor_config.json").write_text("{}")
    return directory


@pytest.fixture
async def seeing(tmp_path: Path) -> AsyncIterator[Asked]:
    pack = make_pack(tmp_path, sees=True)
    (tmp_path / "images").mkdir()
    model = RecitedModel(ModelText("recited", pack, TEMPLATE, images_folder=tmp_path / "images"))
    async with reciting_client(pack, model) as client:
        yield Asked(model, client)


ANTHROPIC = {"type": "image", "source": {"type": "base64", "data": base64_of(PNG)}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(url(PNG))),
        (
            "/v1/responses",
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "look"},
                            {"type": "input_image", "image_url": url(PNG)},
                        ],
                    }
                ]
            },
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 9,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "look"}, ANTHROPIC]}
                ],
            },
        ),
    ],
)
async def test_every_interface_takes_them(path: str, body: dict[str, Any], seeing: Asked) -> None:
    status, text = await seeing.ask(path, body)
    assert status == 200, text
    assert seeing.model.images == [(PNG,)]
    assert "user: look<|begin|><|image|><|end of image|>assistant: " in seeing.model.prompts[0]


async def test_ollama_has_them_before_the_text(seeing: Asked) -> None:
    messages = [{"role": "user", "content": "look", "images": [base64_of(PNG), base64_of(JPEG)]}]
    for path, body in (
        (OLLAMA, {"messages": messages}),
        ("/api/generate", {"prompt": "look", "images": messages[0]["images"]}),
    ):
        status, text = await seeing.ask(path, body)
        assert status == 200, text
        assert seeing.model.images.pop() == (PNG, JPEG)
        marker = "<|begin|><|image|><|end of image|>"
        assert f"user: {marker}{marker}look" in seeing.model.prompts.pop()


async def test_files_below_one_directory(seeing: Asked, tmp_path: Path) -> None:
    """And no others, whatever links and dots lead there."""
    inside, outside = tmp_path / "images/a b.png", tmp_path / "c.png"
    inside.write_bytes(PNG)
    outside.write_bytes(JPEG)
    (tmp_path / "images/link.png").symlink_to(outside)
    status, text = await seeing.ask(CHAT, chat(inside.as_uri()))
    assert status == 200, text
    assert seeing.model.images == [(PNG,)]
    for address in (
        outside.as_uri(),
        f"file://{tmp_path}/images/../c.png",
        f"file://{tmp_path}/images/link.png",
        f"file://other.host{inside}",
        f"file://{tmp_path}/images/none.png",
    ):
        status, text = await seeing.ask(CHAT, chat(address))
        assert status == 400
        assert "messages[0].content[1].image_url.url " in text
    assert len(seeing.model.images) == 1


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        (CHAT, chat("http://169.254.169.254/"), ".image_url.url", "does not fetch"),
        (CHAT, chat("ftp://x"), ".image_url.url", "neither a data: nor a file: URL"),
        (CHAT, chat("data:image/png;base64,!"), ".image_url.url", "no base64"),
        (CHAT, chat("data:image/png,xyz"), ".image_url.url", "not in base64"),
        (CHAT, chat(7), ".image_url.url", "give an image, in base64"),
        (CHAT, chat(url(b"GIF89a")), ".image_url.url", "is no image"),
        (CHAT, chat(url(b"#!/bin/sh")), ".image_url.url", "is no image"),
        (CHAT, chat(url(b"%!PS-Adobe-3.0 EPSF-3.0")), ".image_url.url", "is no image"),
        (CHAT, chat(url(JPEG[:-200])), ".image_url.url", "cut off or damaged"),
        (CHAT, chat(url(bomb(100_000, 100_000))), ".image_url.url", "pixels"),
        (CHAT, chat(url(bomb(9_000, 9_000))), ".image_url.url", "9000 x 9000 pixels"),
        (CHAT, chat(*[url(PNG)] * (MAX_IMAGES + 1)), ".image_url.url", f"image {MAX_IMAGES + 1}"),
        (
            "/v1/messages",
            {
                "max_tokens": 9,
                "system": "Be brief.",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "look"},
                            {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
                        ],
                    }
                ],
            },
            ".source.data",
            "is no image",
        ),
    ],
)
async def test_what_is_refused_names_its_field(
    path: str, body: dict[str, Any], field: str, message: str, seeing: Asked
) -> None:
    status, text = await seeing.ask(path, body)
    assert status == 400
    said = json.loads(text)["error"]["message"]
    assert said.startswith("messages[0].content["), said
    assert f"]{field} " in said
    assert message in said
    assert not seeing.model.prompts


async def test_large_files_are_refused_before_they_are_read(seeing: Asked, tmp_path: Path) -> None:
    large = tmp_path / "images/large.png"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    status, text = await seeing.ask(CHAT, chat(large.as_uri()))
    assert (status, "and an image may have 20.0 MiB" in text) == (400, True), text


async def test_a_place_without_its_image(seeing: Asked) -> None:
    body = {"messages": [{"role": "user", "content": "<|image|>"}]}
    status, text = await seeing.ask(CHAT, body)
    assert status == 400
    assert "The text has <|image|>, which stands for an image; leave it out" in text
    seeing.model.text.chat_template = "{{ messages[0].role }}"
    status, text = await seeing.ask(CHAT, chat(url(PNG)))
    assert (status, "has 0 places for 1 images" in text) == (400, True), text


async def test_tokens_of_images_are_not_guessed(seeing: Asked) -> None:
    for path in ("/v1/messages/count_tokens", "/tokenize", "/v1/chat/completions/input_tokens"):
        body = {"messages": [{"role": "user", "content": [ANTHROPIC]}]}
        status, text = await seeing.ask(path, body)
        assert (status, "known once they are looked at" in text) == (400, True), text


async def test_a_model_packed_as_text_says_why(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, sees=False)
    model = RecitedModel(ModelText("recited", pack, TEMPLATE))
    async with reciting_client(pack, model) as client:
        status, text = await Asked(model, client).ask(CHAT, chat(url(PNG)))
    assert status == 400
    assert (
        "messages[0].content[1] is an image, and recited takes text only, as it was packed" in text
    )
