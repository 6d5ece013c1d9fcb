"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in vLLM's forms and llama-server's."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.server.api.chat import ChatRequest, chat_of
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.requests import read_body
from expertd_inference.server.chat.prompt import prompt_of
from expertd_inference.server.front import front_of
from expertd_inference.server.hosting.model_text import ModelText


class TokenizeRequest(ChatRequest, kw_only=True):
    """A text or a chat: ``prompt`` or ``messages`` is vLLM's, ``content`` llama-server's."""

    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Some tokens."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    """``POST /tokenize``."""
    front = front_of(request)
    body = await read_body(request, TokenizeRequest, front.say)
    front.check_template(body.chat_template)
    entry, text = await front.model(body.model)
    body.fill(entry.variant)
    given = [name for name in ("prompt", "messages", "content") if getattr(body, name)]
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} exclude each other; give one.", param=given[0])
    if body.content is not None:
        return _json({"tokens": await front.aside(lambda: _pieces(text, body))})
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        tokens = await front.aside(lambda: text.encode(body.prompt or "", special=special))
    elif body.messages:
        prompt = await front.aside(lambda: prompt_of(text, chat_of(body)))
        prompt.num_tokens  # noqa: B018 - which refuses images
        tokens = body.cut(prompt.tokens)
    else:
        raise ApiError(400, "Give prompt, messages or content to tokenize.", param="prompt")
    answer: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": entry.hosted.max_tokens,
        "token_strs": text.tokenizer.convert_ids_to_tokens(tokens)
        if body.return_token_strs
        else None,
    }
    return _json(answer)


async def detokenize(request: Request) -> Response:
    """``POST /detokenize``: the text under vLLM's name, ``prompt``, and llama-server's."""
    front = front_of(request)
    body = await read_body(request, DetokenizeRequest, front.say)
    _, text = await front.model(body.model)
    most = len(text.tokenizer)
    for token in body.tokens:
        if not 0 <= token < most:
            raise ApiError(
                400, f"tokens has {token}; this model's are 0 to {most - 1}.", param="tokens"
            )
    decoded = await front.aside(lambda: text.decode(body.tokens))
    return _json({"prompt": decoded, "content": decoded})


async def tokenizer_info(request: Request) -> Response:
    """``GET /tokenizer_info``: what lm-eval asks of a remote tokenizer; ``?model=`` chooses."""
    _, text = await front_of(request).model(request.query_params.get("model"))
    tokenizer = text.tokenizer
    return _json(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "chat_template": text.chat_template,
        }
    )


def _pieces(text: ModelText, body: TokenizeRequest) -> list[Any]:
    """As llama-server has them: a piece is a text, or bytes where it is no whole character."""
    if not body.parse_special:
        raise ApiError(
            400,
            "parse_special may only be true: special tokens in a text are always known.",
            param="parse_special",
        )
    tokens = text.encode(body.content or "", special=body.add_special)
    if not body.with_pieces:
        return [*tokens]
    return [{"id": token, "piece": _piece(text.token_bytes(token))} for token in tokens]


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return [*data]


def _json(value: Any) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), media_type="application/json")
