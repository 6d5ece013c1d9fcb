"""The formats in which models write reasoning and calls of tools; one family of models each.

The formats are public, in the models' chat templates and documentation; what serves them elsewhere
is vLLM's tool and reasoning parsers, and llama.cpp's.
"""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from expertd_inference.server.chat import calls
from expertd_inference.server.chat.calls import ReadCalls
from expertd_inference.server.chat.regions import Kind, Region
from expertstore.errors import InvalidInputError


def call_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates take no others."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class Family:
    """One format.

    A chat template with all of one of ``signs`` is of this family. An assistant's message follows
    one of ``anchors``. ``inside`` are tokens that ``read`` needs beside the regions' markers.
    ``after_reasoning`` stands between reasoning and what follows, ``before_content`` before
    content, where a model does not write it without.
    """

    name: str
    regions: tuple[Region, ...] = ()
    read: ReadCalls = calls.json_calls
    signs: tuple[tuple[str, ...], ...] = ()
    anchors: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    new_id: Callable[[], str] = call_id
    after_reasoning: str = ""
    before_content: str = ""

    def markers(self, *, tools: bool) -> set[str]:
        """All texts that mean something, with or without calls of tools."""
        found = {one for region in self.enabled(tools=tools) for one in _markers_of(region)}
        return found | set(self.inside if tools else ())

    def enabled(self, *, tools: bool) -> list[Region]:
        """The regions to look for."""
        if tools:
            return [*self.regions]
        not_found = {one for region in self.regions if region.of_tools for one in region.opens}
        return [
            replace(region, until=tuple(one for one in region.until if one not in not_found))
            for region in self.regions
            if not region.of_tools
        ]


def _markers_of(region: Region) -> tuple[str, ...]:
    return (*region.opens, *region.closes, *region.until)


def _calls(
    opens: str | tuple[str, ...],
    *closes: str,
    until: tuple[str, ...] = (),
    in_json: bool = False,
) -> Region:
    opens = (opens,) if isinstance(opens, str) else opens
    return Region(Kind.CALLS, opens, closes, until, of_tools=True, in_json=in_json)


def _marks(*markers: str, of_tools: bool = False) -> Region:
    return Region(Kind.MARK, markers, of_tools=of_tools)


def _think(*until: str) -> Region:
    """Reasoning, which models sometimes leave by calling a tool at once: ``until`` begins that."""
    return Region(Kind.REASONING, ("<think>",), ("</think>",), until)


_CHATML = "<|im_start|>assistant\n"
PLAIN = Family("plain")
FAMILIES = (
    Family(
        "gpt-oss",
        (
            Region(
                Kind.REASONING, ("<|channel|>analysis<|message|>",), ("<|end|>",), ("<|start|>",)
            ),
            _calls(
                tuple(
                    f"{head} to="
                    for head in (
                        "<|channel|>commentary",
                        "<|channel|>analysis",
                        "<|start|>assistant",
                    )
                ),
                *("<|call|>", "<|end|>"),
                until=("<|start|>",),
                in_json=True,
            ),
            _marks(
                *("<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
                *("<|start|>assistant", "<|end|>", "<|return|>"),
            ),
        ),
        calls.harmony_call,
        signs=(("<|channel|>", "<|message|>"),),
        anchors=("<|start|>assistant",),
        inside=("<|constrain|>", "<|channel|>", "<|message|>"),
        after_reasoning="<|start|>assistant",
        before_content="<|channel|>final<|message|>",
    ),
    Family(
        "gemma4",
        (
            Region(Kind.REASONING, ("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),
            _calls("<|tool_call>", "<tool_call|>"),
            _marks("<|tool_response>", of_tools=True),
        ),
        calls.gemma_call,
        signs=(("<|tool_call>",), ("<|channel>",)),
        anchors=("<|turn>model\n", "<tool_response|>"),
        inside=('<|"|>',),
    ),
    Family(
        "deepseek-v3.2",
        (
            _think("<｜DSML｜function_calls>"),
            _calls("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        ),
        calls.or_json(calls.invoke_tags),
        signs=(("｜DSML｜",),),
        anchors=("<｜Assistant｜>", "</function_results>"),
        inside=("｜DSML｜",),
    ),
    Family(
        "deepseek",
        (
            _think(*("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")),
            _calls("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", in_json=True),
            _marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", of_tools=True),
        ),
        calls.deepseek_call,
        signs=(("<｜tool▁call▁begin｜>",), ("<｜tool▁calls▁begin｜>",)),
        anchors=("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
        inside=("<｜tool▁sep｜>",),
    ),
    Family(
        "kimi",
        (
            _think(*("<|tool_calls_section_begin|>", "<|tool_call_begin|>")),
            _calls("<|tool_call_begin|>", "<|tool_call_end|>", in_json=True),
            _marks("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", of_tools=True),
        ),
        calls.kimi_call,
        signs=(("<|tool_call_begin|>",), ("<|tool_calls_section_begin|>",)),
        anchors=("<|im_assistant|>assistant<|im_middle|>",),
        inside=("<|tool_call_argument_begin|>",),
    ),
    Family(
        "minimax",
        (_think("<minimax:tool_call>"), _calls("<minimax:tool_call>", "</minimax:tool_call>")),
        calls.or_json(calls.invoke_tags),
        signs=(("<minimax:tool_call>",),),
        anchors=("]~b]ai\n",),
    ),
    Family(
        "mistral",
        (
            Region(Kind.REASONING, ("[THINK]",), ("[/THINK]",)),
            _calls("[TOOL_CALLS]", until=("[TOOL_CALLS]",), in_json=True),
        ),
        calls.mistral_calls,
        signs=(("[TOOL_CALLS]",), ("[THINK]",)),
        anchors=("[/INST]", "[/TOOL_RESULTS]"),
        inside=("[ARGS]", "[CALL_ID]"),
        new_id=_short_id,
    ),
    Family(
        "hunyuan",
        (
            _think("<tool_calls>"),
            _calls("<tool_calls>", "</tool_calls>", in_json=True),
            _marks("<answer>", "</answer>"),
        ),
        calls.hunyuan_calls,
        signs=(("<tool_calls>",),),
        anchors=("<|extra_0|>", "<｜hy_Assistant｜>"),
        inside=("<tool_call>", "</tool_call>", "<tool_sep>"),
    ),
    Family(
        "granite",
        (_think("<|tool_call|>"), _calls("<|tool_call|>"), _marks("<response>", "</response>")),
        signs=(("<|tool_call|>", "<|start_of_role|>"),),
        anchors=("<|start_of_role|>assistant<|end_of_role|>",),
    ),
    Family(
        "glm",
        (_think("<tool_call>"), _calls("<tool_call>", "</tool_call>")),
        calls.or_json(calls.argument_tags),
        signs=(("<arg_key>",),),
        anchors=("<|assistant|>",),
    ),
    Family(
        "qwen-coder",
        (
            _think("<tool_call>"),
            _calls("<tool_call>", "</tool_call>"),
            # The model sometimes leaves out the tag around it.
            _calls("<function=", "</function>"),
            _marks("</tool_call>", of_tools=True),
        ),
        calls.or_json(calls.function_tags),
        signs=(("<function=", "<parameter="),),
        anchors=(_CHATML,),
    ),
    Family(
        "hermes",
        (_think("<tool_call>"), _calls("<tool_call>", "</tool_call>", in_json=True)),
        signs=(("<tool_call>",),),
        anchors=(_CHATML, "<|start_of_role|>assistant<|end_of_role|>"),
    ),
    Family(
        "llama3",
        (
            _calls("<|python_tag|>", "<|eom_id|>", "<|eot_id|>", in_json=True),
            Region(
                Kind.CALLS,
                ('{"name"', '{ "name"', '{\n  "name"', '{"type": "function"', '{"function"'),
                of_tools=True,
                at_start=True,
            ),
        ),
        signs=(("<|python_tag|>",), ("<|start_header_id|>", "ipython")),
        anchors=("<|start_header_id|>assistant<|end_header_id|>\n\n",),
    ),
    Family("think", (_think(),), signs=(("<think>",), ("</think>",))),
    PLAIN,
)
"""In the order in which they are recognized."""
NAMES = tuple(family.name for family in FAMILIES)


def family_named(name: str) -> Family:
    """Raises InvalidInputError if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise InvalidInputError(f"There is no chat format {name!r}; give one of {', '.join(NAMES)}.")
