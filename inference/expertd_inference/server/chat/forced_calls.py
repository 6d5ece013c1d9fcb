"""The forms in which families of models call tools, for calls that a client requires.

They are those of the models' chat templates, by the families' names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertd_inference.grammar import GrammarSpec
from expertd_inference.server.chat.call_grammar import (
    CallForm,
    SpecialTokens,
    TaggedForm,
    grammar_of_calls,
)

_OBJECT = '{"name": "NAME", "arguments": '


@dataclass(frozen=True, kw_only=True)
class _Form:
    """``opening``, the arguments of tool NAME, ``closing``; all calls are between the other two.

    ``argument`` is what opens and closes an argument KEY, where each has tags of its own. Several
    calls have ``between`` between them; with None there is one.
    """

    opening: str
    closing: str
    before: str = ""
    after: str = ""
    between: str | None = None
    argument: tuple[str, str] | None = None


def _listed(before: str, after: str = "]") -> _Form:
    return _Form(before=before, opening=_OBJECT, closing="}", after=after, between=", ")


_FORMS = {
    "gpt-oss": _Form(
        opening="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        closing="<|call|>",
    ),
    "deepseek": _Form(
        before="<\uff5ctool▁calls▁begin\uff5c>",
        opening="<\uff5ctool▁call▁begin\uff5c>NAME<\uff5ctool▁sep\uff5c>",
        closing="<\uff5ctool▁call▁end\uff5c>",
        after="<\uff5ctool▁calls▁end\uff5c>",
        between="",
    ),
    "kimi": _Form(
        before="<|tool_calls_section_begin|>",
        opening="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        closing="<|tool_call_end|>",
        after="<|tool_calls_section_end|>",
    ),
    "minimax": _Form(
        before="<minimax:tool_call>\n",
        opening='<invoke name="NAME">\n',
        argument=('<parameter name="KEY">', "</parameter>\n"),
        closing="</invoke>\n",
        after="</minimax:tool_call>",
        between="",
    ),
    "mistral": _listed("[TOOL_CALLS]["),
    "hunyuan": _listed("<tool_calls>[", "]</tool_calls>"),
    "granite": _listed("<|tool_call|>["),
    "glm": _Form(
        opening="<tool_call>NAME\n",
        argument=("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
        closing="</tool_call>",
        between="\n",
    ),
    "qwen-coder": _Form(
        opening="<tool_call>\n<function=NAME>\n",
        argument=("<parameter=KEY>\n", "\n</parameter>\n"),
        closing="</function>\n</tool_call>",
        between="\n",
    ),
    "hermes": _Form(opening=f"<tool_call>\n{_OBJECT}", closing="}\n</tool_call>", between="\n"),
    "llama3": _Form(opening='{"name": "NAME", "parameters": ', closing="}"),
}
_MISTRAL_WITH_TOKENS = _Form(opening="[TOOL_CALLS]NAME[ARGS]", closing="", between="")
FORCED = frozenset(_FORMS)
"""Families whose calls can be forced."""


def grammar_of_tools(
    family: str,
    tools: Sequence[Mapping[str, Any]],
    special_tokens: SpecialTokens,
    *,
    parallel: bool,
) -> GrammarSpec | None:
    """A call of one of ``tools``, which are OpenAI's; with ``parallel`` several, if the family can.

    None for a family whose calls cannot be forced.
    """
    form = _FORMS.get(family)
    if family == "mistral" and "[ARGS]" in special_tokens:
        form = _MISTRAL_WITH_TOKENS
    if form is None:
        return None
    return grammar_of_calls(
        [_of_tool(form, tool["function"]) for tool in tools],
        special_tokens,
        before=form.before,
        between=form.between if parallel else None,
        after=form.after,
    )


def _of_tool(form: _Form, function: Mapping[str, Any]) -> CallForm | TaggedForm:
    schema = function.get("parameters") or {"type": "object", "additionalProperties": False}
    opening = form.opening.replace("NAME", function["name"])
    if form.argument is None:
        return CallForm(opening=opening, schema={"type": "object", **schema}, closing=form.closing)
    return TaggedForm(
        opening=opening,
        argument_opening=form.argument[0],
        argument_closing=form.argument[1],
        schema=schema,
        closing=form.closing,
    )
