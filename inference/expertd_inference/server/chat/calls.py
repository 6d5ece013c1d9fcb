"""Reads calls of tools in the forms that models write them in; broken ones raise ValueError."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from expertd_inference.server.chat.schemas import ToolSchemas


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call as the model wrote it; ``id`` is its own, if its format has ids."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


ReadCalls = Callable[[str, ToolSchemas], Sequence[RawCall]]
"""Reads the body of a region; the schemas say of which types arguments without quotes are."""
_decoder = json.JSONDecoder(strict=False)
"""Not strict: models leave line breaks in strings as they are."""
_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
_BARE_KEY = re.compile(r"([{,]\s*)([\w.\-]+)\s*:")


def json_calls(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """Objects ``{"name": ..., "arguments": {...}}``: one, a list, or some with ; between."""
    del schemas
    found: list[RawCall] = []
    rest = body.strip().rstrip(";").rstrip()
    while rest:
        value, end = _decoder.raw_decode(rest)
        found += [_json_call(one) for one in (value if isinstance(value, list) else [value])]
        rest = rest[end:].lstrip("; \t\r\n,")
    return _some(found, body)


def or_json(read: ReadCalls) -> ReadCalls:
    """As ``read``, or as :func:`json_calls` where that is what stands between the tags."""

    def read_either(body: str, schemas: ToolSchemas) -> Sequence[RawCall]:
        is_json = body.lstrip().startswith(("{", "["))
        return json_calls(body, schemas) if is_json else read(body, schemas)

    return read_either


def function_tags(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``<function=NAME><parameter=KEY>VALUE</parameter></function>``, by Qwen3-Coder.

    The beginning of the first tag may be missing, if it is what opened the region.
    """
    text = body.strip().removeprefix("<function=")
    found = []
    for part in text.split("<function="):
        name, _, rest = part.partition(">")
        pairs = []
        for one in rest.partition("</function>")[0].split("<parameter=")[1:]:
            key, _, value = one.partition(">")
            pairs.append((key, _without_breaks(value.partition("</parameter>")[0])))
        found.append(_typed(name, pairs, schemas))
    return found


def invoke_tags(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>``.

    By MiniMax-M2, and by DeepSeek-V3.2, whose ``string="false"`` marks values that are JSON.
    """
    found = []
    for part in body.replace("｜DSML｜", "").split("<invoke name=")[1:]:
        name, _, rest = part.partition(">")
        pairs, strings = [], set()
        for one in rest.partition("</invoke>")[0].split("<parameter name=")[1:]:
            head, _, value = one.partition(">")
            key, _, kind = head.partition(" string=")
            key = key.strip('" ')
            if kind == '"true"':
                strings.add(key)
            pairs.append((key, _without_breaks(value.partition("</parameter>")[0])))
        found.append(_typed(name.strip('" '), pairs, schemas, strings))
    return _some(found, body)


def argument_tags(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value>``, by GLM-4.5."""
    name, _, rest = body.strip().partition("<arg_key>")
    pairs = re.findall(
        r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", f"<arg_key>{rest}", re.DOTALL
    )
    if rest and not pairs:
        raise ValueError(f"an argument has no value: {rest:.80}")
    return [_typed(name, pairs, schemas)]


def gemma_call(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``call:NAME{key:<|"|>text<|"|>,other:3}``, by Gemma 4."""
    del schemas
    head, found, rest = body.partition("{")
    if not found or not head.strip().startswith("call:"):
        raise ValueError(f"no call: {body:.80}")
    name = head.strip().removeprefix("call:")
    with suppress(ValueError):  # As a grammar has it written.
        return [_call(name, _decoder.decode("{" + rest.strip()))]
    # Texts first, so that nothing in them is taken for a key.
    pieces = ("{" + rest.strip()).split('<|"|>')
    pieces[::2] = [_BARE_KEY.sub(r'\1"\2":', piece) for piece in pieces[::2]]
    pieces[1::2] = [json.dumps(piece) for piece in pieces[1::2]]
    return [_call(name, _decoder.decode("".join(pieces)))]


def deepseek_call(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``function<｜tool▁sep｜>NAME`` and fenced JSON, by DeepSeek-V3; V3.1: NAME, sep, JSON."""
    del schemas
    first, found, rest = body.partition(_DEEPSEEK_SEPARATOR)
    if not found:
        raise ValueError(f"no separator: {body:.80}")
    name, arguments = first, rest
    if first.strip() == "function" and not rest.lstrip().startswith("{"):
        name, _, arguments = rest.partition("\n")
    return [_call(name, _decoder.decode(_unfenced(arguments)))]


def kimi_call(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``functions.NAME:0<|tool_call_argument_begin|>{...}``, by Kimi K2; the first is its id."""
    del schemas
    id_, found, arguments = body.partition("<|tool_call_argument_begin|>")
    if not found:
        raise ValueError(f"no arguments: {body:.80}")
    id_ = id_.strip()
    name = id_.removeprefix("functions.").rpartition(":")[0] or id_
    return [_call(name, _decoder.decode(arguments.strip() or "{}"), id_)]


def harmony_call(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """``functions.NAME<|channel|>commentary json<|message|>{...}``, by gpt-oss."""
    del schemas
    head, found, arguments = body.partition("<|message|>")
    if not found:
        raise ValueError(f"no message: {body:.80}")
    recipient = re.split(r"\s|<\|", head.strip(), maxsplit=1)[0]
    return [_call(recipient.removeprefix("functions."), _decoder.decode(arguments.strip() or "{}"))]


def hunyuan_calls(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """A list as of :func:`json_calls`; newer ones as DeepSeek-V3's, in tags of their own."""
    if "<tool_call>" not in body:
        return json_calls(body, schemas)
    found: list[RawCall] = []
    for part in body.split("<tool_call>")[1:]:
        call = part.partition("</tool_call>")[0].replace("<tool_sep>", _DEEPSEEK_SEPARATOR)
        found += deepseek_call(call, schemas)
    return found


def mistral_calls(body: str, schemas: ToolSchemas) -> list[RawCall]:
    """A list as of :func:`json_calls`, or ``NAME[CALL_ID]ID[ARGS]{...}``, or ``NAME{...}``."""
    text = body.strip()
    if text.startswith(("[{", "{", "[ {")) or text == "[]":
        return json_calls(text, schemas)
    found = re.match(
        r"(?P<name>[^\[{\s]+)\s*(?:\[CALL_ID\](?P<id>[^\[{]*))?(?:\[ARGS\])?\s*(?P<json>\{.*)$",
        text,
        re.DOTALL,
    )
    if found is None:
        raise ValueError(f"no call: {body:.80}")
    return [_call(found["name"], _decoder.decode(found["json"].strip()), found["id"])]


def _json_call(value: Any) -> RawCall:  # noqa: ANN401 - of any JSON
    if not isinstance(value, dict):
        raise ValueError("a call is no object")
    if isinstance(value.get("function"), dict):
        value = value["function"]
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _decoder.decode(arguments or "{}")
    return _call(value.get("name", value.get("function")), arguments)


def _call(name: Any, arguments: Any, id_: str | None = None) -> RawCall:  # noqa: ANN401
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a call has no name")
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return RawCall(name.strip(), arguments, (id_ or "").strip() or None)


def _typed(
    name: str,
    pairs: Sequence[tuple[str, str]],
    schemas: ToolSchemas,
    strings: frozenset[str] | set[str] = frozenset(),
) -> RawCall:
    name = name.strip()
    if not name or re.search(r"[\s<>{}\"]", name):
        raise ValueError(f"no name of a function: {name:.80}")
    arguments = {}
    for key, value in pairs:
        key = key.strip()
        arguments[key] = value if key in strings else schemas.cast(name, key, value)
    return _call(name, arguments)


def _without_breaks(value: str) -> str:
    """Without the line breaks that set it apart from its tags."""
    return value.removeprefix("\n").removesuffix("\n")


def _unfenced(text: str) -> str:
    """Without a Markdown fence around it."""
    text = text.strip()
    if text.startswith("```"):
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    return text.strip()


def _some(calls: list[RawCall], body: str) -> list[RawCall]:
    if not calls:
        raise ValueError(f"no call: {body:.80}")
    return calls
