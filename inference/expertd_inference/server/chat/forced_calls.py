"""The forms in which families of models call tools, for calls that a grammar makes them write.

They are those of the models' chat templates, by the families' names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from expertd_inference.server.chat.call_grammar import (
    CallForm,
    SpecialTokens,
    TaggedForm,
    rules_of_calls,
)
from expertd_inference.server.chat.schemas import fits_tags
from expertd_inference.server.chat.tools import schema_of

_OBJECT = '{"name": "NAME", "arguments": '


@dataclass(frozen=True, kw_only=True)
class _Form:
    """``opening``, the arguments of tool NAME, ``closing``; all calls are between the other two.

    All begin with ``lead``; if that is empty, calls are an answer's beginning or nothing.
    ``argument`` is what opens and closes an argument KEY, where each has tags of its own, and
    ``tags`` may not stand in its text. Several calls have ``between`` between them; with None
    there is one. For ``after_number`` see CallForm.
    """

    lead: str
    opening: str
    closing: str
    before: str = ""
    after: str = ""
    between: str | None = None
    argument: tuple[str, str] | None = None
    tags: tuple[str, ...] = ()
    after_number: str | None = None

    @property
    def in_json(self) -> "_Form":
        """The same with arguments as JSON, which the families' parsers know in their tags, too."""
        lead = "" if self.before else f"{self.lead}\n"
        closing = "}\n" if self.before else f"}}\n{self.tags[0]}"
        return replace(self, opening=lead + _OBJECT, closing=closing, argument=None)


def _listed(lead: str, before: str, after: str = "]") -> _Form:
    return _Form(lead=lead, before=before, opening=_OBJECT, closing="}", after=after, between=", ")


_FORMS = {
    # Its models end with a call: there are never several.
    "gpt-oss": _Form(
        lead="<|channel|>commentary to=",
        opening="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        closing="<|call|>",
    ),
    # Its texts have no quotes of JSON's; its parser knows those, too.
    "gemma4": _Form(
        lead="<|tool_call>", opening="<|tool_call>call:NAME", closing="<tool_call|>", between=""
    ),
    "deepseek-v3.2": _Form(
        lead="<\uff5cDSML\uff5cfunction_calls>",
        before="<\uff5cDSML\uff5cfunction_calls>\n",
        opening='<\uff5cDSML\uff5cinvoke name="NAME">\n',
        argument=(
            '<\uff5cDSML\uff5cparameter name="KEY" string="IS_TEXT">',
            "</\uff5cDSML\uff5cparameter>\n",
        ),
        closing="</\uff5cDSML\uff5cinvoke>\n",
        after="</\uff5cDSML\uff5cfunction_calls>",
        between="",
        tags=("\uff5cDSML\uff5c", "</invoke>", "<invoke name=", "</parameter>", "<parameter name="),
    ),
    "deepseek": _Form(
        lead="<\uff5ctool▁calls▁begin\uff5c>",
        before="<\uff5ctool▁calls▁begin\uff5c>",
        opening="<\uff5ctool▁call▁begin\uff5c>NAME<\uff5ctool▁sep\uff5c>",
        closing="<\uff5ctool▁call▁end\uff5c>",
        after="<\uff5ctool▁calls▁end\uff5c>",
        between="",
    ),
    "kimi": _Form(
        lead="<|tool_calls_section_begin|>",
        before="<|tool_calls_section_begin|>",
        opening="<|tool_call_begin|>functions.NAME:",
        after_number="<|tool_call_argument_begin|>",
        closing="<|tool_call_end|>",
        after="<|tool_calls_section_end|>",
        between="",
    ),
    "minimax": _Form(
        lead="<minimax:tool_call>",
        before="<minimax:tool_call>\n",
        opening='<invoke name="NAME">\n',
        argument=('<parameter name="KEY">', "</parameter>\n"),
        closing="</invoke>\n",
        after="</minimax:tool_call>",
        between="",
        tags=(
            "</minimax:tool_call>",
            *("</invoke>", "<invoke name=", "</parameter>", "<parameter name="),
        ),
    ),
    "mistral": _listed("[TOOL_CALLS]", "[TOOL_CALLS] ["),
    "hunyuan": _listed("<tool_calls>", "<tool_calls>[", "]</tool_calls>"),
    "granite": _listed("<|tool_call|>", "<|tool_call|>["),
    "glm": _Form(
        lead="<tool_call>",
        opening="<tool_call>NAME\n",
        argument=("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
        closing="</tool_call>",
        between="\n",
        tags=("</tool_call>", "</arg_value>"),
    ),
    "qwen-coder": _Form(
        lead="<tool_call>",
        opening="<tool_call>\n<function=NAME>\n",
        argument=("<parameter=KEY>\n", "\n</parameter>\n"),
        closing="</function>\n</tool_call>",
        between="\n",
        tags=("</tool_call>", "</function>", "<function=", "</parameter>", "<parameter="),
    ),
    "hermes": _Form(
        lead="<tool_call>",
        opening=f"<tool_call>\n{_OBJECT}",
        closing="}\n</tool_call>",
        between="\n",
    ),
    "llama3": _Form(lead="", opening='{"name": "NAME", "parameters": ', closing="}", between="; "),
}
_MISTRAL_WITH_TOKENS = _Form(
    lead="[TOOL_CALLS]", opening="[TOOL_CALLS]NAME[ARGS]", closing="", between=""
)
FORCED = frozenset(_FORMS)
"""Families whose calls can be forced."""


@dataclass(frozen=True)
class CallRules:
    """Lark's rule ``calls`` and what it needs.

    With ``without_lead`` the text ``lead``, by which a call is known, came already.
    """

    lead: str
    rules: tuple[str, ...]
    without_lead: tuple[str, ...]


def rules_of_tools(
    family: str,
    tools: Sequence[Mapping[str, Any]],
    special_tokens: SpecialTokens,
    *,
    parallel: bool,
) -> CallRules:
    """A call of one of ``tools``, which are OpenAI's; with ``parallel`` several, if the family can.

    The family is one of :data:`FORCED`.
    """
    form = _FORMS[family]
    if family == "mistral" and "[ARGS]" in special_tokens:
        form = _MISTRAL_WITH_TOKENS
    functions = [tool["function"] for tool in tools]
    schemas = [schema_of(function) for function in functions]
    if form.argument is not None and not all(map(fits_tags, schemas)):
        form = form.in_json
    forms = [
        _of_tool(form, function["name"], schema)
        for function, schema in zip(functions, schemas, strict=True)
    ]

    def rules(between: str | None, lead: str = "") -> tuple[str, ...]:
        found = rules_of_calls(
            forms,
            special_tokens,
            before=form.before,
            between=between,
            after=form.after,
            lead=lead,
        )
        return tuple(found)

    # After a lead there is one call, unless all are between tags: the next one has a lead again.
    several = form.between if parallel else None
    return CallRules(form.lead, rules(several), rules(several if form.before else None, form.lead))


def _of_tool(form: _Form, name: str, schema: Mapping[str, Any]) -> CallForm | TaggedForm:
    in_json = form.opening.endswith((_OBJECT, '"parameters": '))
    spelled = msgspec.json.encode(name).decode()[1:-1] if in_json else name
    opening = form.opening.replace("NAME", spelled)
    if form.argument is None:
        return CallForm(
            opening=opening,
            schema=schema,
            closing=form.closing,
            after_number=form.after_number,
        )
    return TaggedForm(
        opening=opening,
        argument_opening=form.argument[0],
        argument_closing=form.argument[1],
        schema=schema,
        closing=form.closing,
        tags=form.tags,
    )
