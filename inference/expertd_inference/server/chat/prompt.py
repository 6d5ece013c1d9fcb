"""A chat as the tokens that a model continues, and what reads its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.chat.answer import AnswerReader, answer_parser
from expertd_inference.server.chat.messages import for_template
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.settings import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What a model is to answer, in the terms of OpenAI's chat completions.

    ``arguments`` are for the template (``chat_template_kwargs``), ``template`` stands in for it.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    documents: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A chat's ``tokens``, whose text is ``prompt``, and how to read the answer."""

    text: ModelText
    tokens: list[int]
    prompt: str
    tools: Sequence[Mapping[str, Any]] | None

    def settings(self, asked: GenerationSettings) -> GenerationSettings:
        """Those that the engine needs so that the answer can be read."""
        return asked

    def reader(self) -> AnswerReader:
        """For one answer; each of several needs its own."""
        return AnswerReader(answer_parser(self.text, self.prompt, self.tools))


def prompt_of(text: ModelText, chat: Chat) -> ChatPrompt:
    """The chat in the model's template. Raises ApiError, InvalidInputError."""
    if chat.continue_final_message and chat.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt exclude each other; set the "
            "latter to false.",
            param="continue_final_message",
        )
    arguments = dict(chat.arguments)
    if chat.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", chat.reasoning_effort)
        if chat.reasoning_effort == "none":
            arguments.setdefault("enable_thinking", False)
    rendered = text.render(
        for_template(chat.messages),
        tools=chat.tools,
        documents=chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        template=chat.template,
        arguments=arguments,
    )
    # The template has written what begins a text.
    return ChatPrompt(text, text.encode(rendered, special=False), rendered, chat.tools)
