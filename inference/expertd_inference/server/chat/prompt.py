"""A chat as the tokens that a model continues, and what reads its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expertd_inference.server.api.errors import ApiError, unsupported
from expertd_inference.server.chat.answer import AnswerReader, answer_parser
from expertd_inference.server.chat.messages import for_template, with_one_system
from expertd_inference.server.chat.recognition import family_of
from expertd_inference.server.chat.tools import chosen_tools
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.settings import GenerationSettings
from expertstore.errors import InvalidInputError


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
    """A chat's ``tokens``, whose text is ``prompt``, and how to read the answer.

    ``tools`` are those that may be called; of several calls ``max_calls`` are passed on.
    """

    text: ModelText
    tokens: list[int]
    prompt: str
    tools: Sequence[Mapping[str, Any]]
    max_calls: int | None = None

    def settings(self, asked: GenerationSettings) -> GenerationSettings:
        """Those that the engine needs so that the answer can be read."""
        if asked.skip_special_tokens and self._shown:
            return replace(asked, skip_special_tokens=False)
        return asked

    def reader(self, asked: GenerationSettings) -> AnswerReader:
        """For one answer; each of several needs its own. ``asked`` is as for :meth:`settings`."""
        shown = self._shown
        hidden = {id_: one for id_, one in self.text.special_tokens.items() if one not in shown}
        return AnswerReader(
            answer_parser(self.text, self.prompt, self.tools),
            hidden if asked.skip_special_tokens and shown else {},
            self.max_calls,
        )

    @property
    def _shown(self) -> set[str]:
        """Special tokens that the answer's parser has to see."""
        markers = family_of(self.text).markers(tools=bool(self.tools))
        special = self.text.special_tokens.values()
        return {one for one in special if any(one in marker for marker in markers)}


def prompt_of(text: ModelText, chat: Chat) -> ChatPrompt:
    """The chat in the model's template. Raises ApiError, InvalidInputError."""
    if chat.continue_final_message and chat.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt exclude each other; set the "
            "latter to false.",
            param="continue_final_message",
        )
    tools = chosen_tools(chat.tools, chat.tool_choice)
    if tools.required:
        raise unsupported("tool_choice", "that requires a call is not supported yet.")
    arguments = dict(chat.arguments)
    if chat.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", chat.reasoning_effort)
        if chat.reasoning_effort == "none":
            arguments.setdefault("enable_thinking", False)
    rendered = _rendered(
        text,
        for_template(chat.messages),
        tools=tools.allowed or None,
        documents=chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        template=chat.template,
        arguments=arguments,
    )
    # The template has written what begins a text.
    return ChatPrompt(
        text,
        text.encode(rendered, special=False),
        rendered,
        tools.allowed,
        None if chat.parallel_tool_calls else 1,
    )


def _rendered(text: ModelText, messages: Sequence[dict[str, Any]], **how: Any) -> str:  # noqa: ANN401
    """The messages in the template, without the loss of any that instructs the model.

    Agents send system messages in the middle of a chat. Some templates refuse them, and some leave
    them out: these get what :func:`with_one_system` makes of the messages.
    """
    later = [one["content"].strip() for one in messages[1:] if one["role"] == "system"]
    try:
        rendered = text.render(messages, **how)
    except InvalidInputError:
        if not later:
            raise
    else:
        if all(one in rendered for one in later):
            return rendered
    return text.render(with_one_system(messages), **how)
