"""Answers in the formats that families of models write, after their public chat templates."""

from dataclasses import dataclass
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "hours": {"type": "array", "items": {"type": "number"}},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ALL = (
    "get_weather",
    {"city": "12\n<b>", "days": 3, "exact": False, "hours": [1, 2.5], "limit": None},
)
NOW: tuple[str, dict[str, Any]] = ("now", {})
OTHER = ("no_tool", {"x": [1, {"y": "ü"}]})


@dataclass(frozen=True)
class Recorded:
    """``text`` continues ``prompt``; the rest is what it says."""

    family: str
    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    prompt: str = ""


_HERMES_PARIS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
)
_HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
_HERMES_OTHER = (
    '<tool_call>\n{"name": "no_tool", "arguments": {"x": [1, {"y": "ü"}]}}\n</tool_call>'
)
_QWEN = "<|im_start|>user\nWhat <think> is <tool_call>?<|im_end|>\n<|im_start|>assistant\n"
_CODER_ALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n<b>\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nFalse\n</parameter>\n"
    "<parameter=hours>\n[1, 2.5]\n</parameter>\n<parameter=limit>\nnull\n</parameter>\n"
    "</function>\n</tool_call>"
)
_GLM_ALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12\n<b></arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
    "<arg_key>exact</arg_key>\n<arg_value>false</arg_value>\n"
    "<arg_key>hours</arg_key>\n<arg_value>[1, 2.5]</arg_value>\n"
    "<arg_key>limit</arg_key>\n<arg_value>null</arg_value>\n</tool_call>"
)
_MINIMAX_ALL = (
    '<invoke name="get_weather">\n<parameter name="city">12\n<b></parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="exact">false</parameter>\n'
    '<parameter name="hours">[1, 2.5]</parameter>\n<parameter name="limit">null</parameter>\n'
    "</invoke>\n"
)
_DSML_ALL = (
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">12\n<b></｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="exact" string="false">false</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="hours" string="false">[1, 2.5]</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="limit" string="false">null</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
)
_JSON_PARIS = '{"city": "Paris", "days": 3}'
_NAMED_PARIS = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'
_NAMED_NOW = '{"name": "now", "arguments": {}}'

RECORDED = {
    "hermes: content": Recorded("hermes", "  Hello\n\n <b> you\n", content="  Hello\n\n <b> you\n"),
    "hermes: all": Recorded(
        "hermes",
        f"<think>\nHm, weather.\n</think>\n\nI look.\n{_HERMES_PARIS}\n{_HERMES_NOW}\nDone.",
        reasoning="Hm, weather.",
        content="I look.Done.",
        calls=(PARIS, NOW),
    ),
    "hermes: reasoning only": Recorded("hermes", "<think>Hm\n", reasoning="Hm"),
    "hermes: reasoning begun by the prompt": Recorded(
        "hermes",
        f"Hm.\n</think>\n\n{_HERMES_OTHER}",
        reasoning="Hm.",
        calls=(OTHER,),
        prompt=f"{_QWEN}<think>\n",
    ),
    "hermes: reasoning closed by the prompt": Recorded(
        "hermes", "Yes.", content="Yes.", prompt=f"{_QWEN}<think>\n\n</think>\n\n"
    ),
    "hermes: reasoning left by a call": Recorded(
        "hermes",
        f"Hm.\n{_HERMES_NOW}",
        reasoning="Hm.",
        calls=(NOW,),
        prompt=f"{_QWEN}<think>\n",
    ),
    "hermes: a message continued": Recorded(
        "hermes", " b> is all", content=" b> is all", prompt=f"{_QWEN}a <"
    ),
    "hermes: broken": Recorded(
        "hermes",
        'Look:\n<tool_call>\n{"name": "now", "arguments": {\n</tool_call> so\n',
        content='Look:\n<tool_call>\n{"name": "now", "arguments": {\n</tool_call> so\n',
    ),
    "hermes: one of two is broken": Recorded(
        "hermes",
        f"{_HERMES_NOW}\n<tool_call>\nnow\n</tool_call>",
        content="<tool_call>\nnow\n</tool_call>",
        calls=(NOW,),
    ),
    "hermes: no number of JSON": Recorded(
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>',
        content='<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>',
    ),
    "hermes: half a character": Recorded(
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"x": "\\ud83d"}}</tool_call>',
        calls=(("now", {"x": "\ud83d"}),),
    ),
    "hermes: markers in strings": Recorded(
        "hermes",
        '<tool_call>\n{"name": "now", "arguments": {"x": "<tool_call>\\"</tool_call>"}}\n'
        f"</tool_call>\nSo.\n{_HERMES_NOW}",
        content="So.",
        calls=(("now", {"x": '<tool_call>"</tool_call>'}), NOW),
    ),
    "hermes: a string without its end": Recorded(
        "hermes",
        f'<tool_call>{{"name": "now}}</tool_call> So.\n{_HERMES_NOW}',
        content='<tool_call>{"name": "now}</tool_call> So.',
        calls=(NOW,),
    ),
    "kimi: a marker in a string": Recorded(
        "kimi",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>"
        '{"x": "<|tool_call_end|>"}<|tool_call_end|>',
        calls=(("now", {"x": "<|tool_call_end|>"}),),
    ),
    "qwen-coder: all": Recorded(
        "qwen-coder",
        f"I look.\n\n{_CODER_ALL}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        content="I look.",
        calls=(ALL, NOW),
    ),
    "qwen-coder: without the outer tag": Recorded(
        "qwen-coder", _CODER_ALL.removeprefix("<tool_call>\n"), calls=(ALL,)
    ),
    "qwen-coder: reasoning": Recorded(
        "qwen-coder",
        f"Hm.\n</think>\n\n{_CODER_ALL}",
        reasoning="Hm.",
        calls=(ALL,),
        prompt=f"{_QWEN}<think>\n",
    ),
    "qwen-coder: broken": Recorded(
        "qwen-coder",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        content="<tool_call>\n<function=>\n</function>\n</tool_call>",
    ),
    "glm: all": Recorded(
        "glm",
        f"\n<think>Hm.</think>\nI look.\n{_GLM_ALL}\n<tool_call>now\n</tool_call>",
        reasoning="Hm.",
        content="I look.",
        calls=(ALL, NOW),
        prompt="[gMASK]<sop><|user|>\nHi<|assistant|>",
    ),
    "glm: broken": Recorded(
        "glm",
        "<tool_call>now\n<arg_key>a</arg_key>\n</tool_call>",
        content="<tool_call>now\n<arg_key>a</arg_key>\n</tool_call>",
    ),
    "minimax: all": Recorded(
        "minimax",
        f"Hm.\n</think>\n\nI look.\n<minimax:tool_call>\n{_MINIMAX_ALL}"
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        reasoning="Hm.",
        content="I look.",
        calls=(ALL, NOW),
        prompt="]~b]user\nHi[e~[\n]~b]ai\n<think>\n",
    ),
    "deepseek-v3.2: all": Recorded(
        "deepseek-v3.2",
        f"Hm.</think>I look.\n\n<｜DSML｜function_calls>\n{_DSML_ALL}"
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        reasoning="Hm.",
        content="I look.",
        calls=(ALL, NOW),
        prompt="<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>",
    ),
    "deepseek: of V3": Recorded(
        "deepseek",
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{_JSON_PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        content="I look.",
        calls=(PARIS, NOW),
    ),
    "deepseek: of V3.1": Recorded(
        "deepseek",
        "Hm.</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        f"{_JSON_PARIS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        reasoning="Hm.",
        content="I look.",
        calls=(PARIS, NOW),
        prompt="<｜User｜>Hi<｜Assistant｜><think>",
    ),
    "deepseek: broken": Recorded(
        "deepseek",
        "<｜tool▁call▁begin｜>now{}<｜tool▁call▁end｜>",
        content="<｜tool▁call▁begin｜>now{}<｜tool▁call▁end｜>",
    ),
    "kimi: all": Recorded(
        "kimi",
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{_JSON_PARIS}<|tool_call_end|><|tool_call_begin|>"
        "functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        content="I look.",
        calls=(PARIS, NOW),
    ),
    "mistral: a list": Recorded(
        "mistral", f"[TOOL_CALLS] [{_NAMED_PARIS}, {_NAMED_NOW}]", calls=(PARIS, NOW)
    ),
    "mistral: by names": Recorded(
        "mistral",
        "[THINK]Hm.[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]"
        f"{_JSON_PARIS}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
        reasoning="Hm.",
        content="I look.",
        calls=(PARIS, NOW),
        prompt="<s>[INST]Hi[/INST]",
    ),
    "mistral: broken": Recorded(
        "mistral", "[TOOL_CALLS]now[ARGS]{", content="[TOOL_CALLS]now[ARGS]{"
    ),
    "granite: all": Recorded(
        "granite", f"<|tool_call|>[{_NAMED_PARIS}, {_NAMED_NOW}]", calls=(PARIS, NOW)
    ),
    "granite: thinking": Recorded(
        "granite",
        "<think>Hm.</think>\n<response>Yes.</response>",
        reasoning="Hm.",
        content="Yes.",
    ),
    "hunyuan: a list": Recorded(
        "hunyuan",
        f"<think>\nHm.\n</think>\n<tool_calls>[{_NAMED_PARIS}, {_NAMED_NOW}]</tool_calls>",
        reasoning="Hm.",
        calls=(PARIS, NOW),
    ),
    "hunyuan: by tags": Recorded(
        "hunyuan",
        "<tool_calls>\n<tool_call>function<tool_sep>get_weather\n```json\n"
        f"{_JSON_PARIS}\n```</tool_call>\n</tool_calls>",
        calls=(PARIS,),
    ),
    "hunyuan: an answer": Recorded(
        "hunyuan",
        "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>",
        reasoning="Hm.",
        content="Yes.",
    ),
    "llama3: bare": Recorded(
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}; '
        '{"name": "now", "parameters": {}}',
        calls=(PARIS, NOW),
        prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama3: tagged": Recorded("llama3", f"<|python_tag|>{_NAMED_PARIS}", calls=(PARIS,)),
    "llama3: no call": Recorded("llama3", 'So: {"name": "now"}', content='So: {"name": "now"}'),
    "llama3: broken": Recorded("llama3", '{"name": "now"', content='{"name": "now"'),
    "gemma4: all": Recorded(
        "gemma4",
        "<|channel>thought\nHm.<channel|>I look."
        '<|tool_call>call:get_weather{city:<|"|>12\n<b><|"|>,days:3,exact:false,'
        "hours:[1,2.5],limit:null}<tool_call|><|tool_call>call:now{}<tool_call|>",
        reasoning="Hm.",
        content="I look.",
        calls=(ALL, NOW),
        prompt="<bos><|turn>user\nHi<turn|>\n<|turn>model\n",
    ),
    "gemma4: what looks like keys": Recorded(
        "gemma4",
        '<|tool_call>call:no_tool{x:[1,{<|"|>y<|"|>:<|"|>ü<|"|>}]}<tool_call|>'
        '<|tool_call>call:get_weather{city:<|"|>{a:"b",c:}<|"|>}<tool_call|>',
        calls=(OTHER, ("get_weather", {"city": '{a:"b",c:}'})),
    ),
    "gemma4: broken": Recorded(
        "gemma4",
        "<|tool_call>call:now{x:}<tool_call|>",
        content="<|tool_call>call:now{x:}<tool_call|>",
    ),
    "gpt-oss: an answer": Recorded(
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Yes, \nindeed.<|return|>",
        reasoning="Hm.",
        content="Yes, \nindeed.",
        prompt="<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ),
    "gpt-oss: a call": Recorded(
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
        f" to=functions.get_weather <|constrain|>json<|message|>{_JSON_PARIS}<|call|>",
        reasoning="Hm.",
        calls=(PARIS,),
        prompt="<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ),
    "gpt-oss: the recipient first": Recorded(
        "gpt-oss",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        calls=(NOW,),
        prompt="<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ),
    "gpt-oss: a preamble and calls": Recorded(
        "gpt-oss",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary"
        " to=functions.now json<|message|>{}<|end|><|start|>assistant<|channel|>commentary"
        f" to=functions.get_weather<|message|>{_JSON_PARIS}",
        content="I look.",
        calls=(NOW, PARIS),
        prompt="<|start|>assistant",
    ),
    "think: an answer": Recorded("think", "<think>\n\n</think>\n\nYes.\n", content="Yes.\n"),
    "think: begun by an unknown template": Recorded(
        "think", "Hm.</think>Yes.", reasoning="Hm.", content="Yes.", prompt="[x]<think>\n"
    ),
    "plain: all of it": Recorded(
        "plain", f"<think>a</think> {_HERMES_NOW}", content=f"<think>a</think> {_HERMES_NOW}"
    ),
}
