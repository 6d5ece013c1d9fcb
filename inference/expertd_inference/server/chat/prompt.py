"""A chat as the tokens that a model continues, and what reads its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expertd_inference.grammar import GrammarSpec
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.chat.answer import AnswerParser, AnswerReader
from expertd_inference.server.chat.answer_grammar import AnswerGrammar, Reasoning
from expertd_inference.server.chat.families import Family, family_named
from expertd_inference.server.chat.forced_calls import FORCED, rules_of_tools
from expertd_inference.server.chat.messages import for_template, in_turns
from expertd_inference.server.chat.recognition import family_of, family_that_calls
from expertd_inference.server.chat.regions import Kind
from expertd_inference.server.chat.tools import Tools, chosen_tools
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.settings import GenerationSettings
from expertstore.errors import InvalidInputError

FOREIGN = "hermes"
"""The format of calls that are required of a model which knows none."""

_OWN_ARGUMENTS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *(
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "processor_kwargs",
    ),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What templates are given in any case, or what would change how transformers renders them."""
LONG_CHARACTERS = 40
"""A shorter text may stand in another by chance."""


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

    Of several calls of ``tools`` ``max_calls`` are passed on. ``continues`` says that the prompt
    has the beginning of the content.
    """

    text: ModelText
    tokens: list[int]
    prompt: str
    tools: Tools
    max_calls: int | None = None
    continues: bool = False
    images: tuple[bytes, ...] = ()
    """The files of those that the tokens have a place for."""

    @property
    def num_tokens(self) -> int:
        """How many the prompt has. Raises ApiError where only an engine could tell."""
        return count_tokens(self.tokens, self.images)

    def settings(self, asked: GenerationSettings) -> GenerationSettings:
        """Those that the engine needs so that the answer can be read, and is as it was asked for.

        Raises ApiError for tools whose calls no grammar can describe.
        """
        family = self._family(asked)
        skips = asked.skip_special_tokens and not self._shown(family)
        grammar = self._grammar(family, asked.grammar)
        return replace(asked, skip_special_tokens=skips, grammar=grammar)

    def reader(self, asked: GenerationSettings) -> AnswerReader:
        """For one answer; each of several needs its own. ``asked`` is as for :meth:`settings`."""
        family = self._family(asked)
        shown = self._shown(family)
        hidden = {id_: one for id_, one in self.text.special_tokens.items() if one not in shown}
        return AnswerReader(
            AnswerParser(family, self.prompt, self.tools.allowed),
            hidden if asked.skip_special_tokens and shown else {},
            self.max_calls,
        )

    def _family(self, asked: GenerationSettings) -> Family:
        """Whose format the answer has: one in which calls can be forced, if some have to be."""
        tools = self.tools
        if tools.required or tools.strict or (tools.allowed and asked.grammar is not None):
            if (calling := family_that_calls(self.text)) is not None:
                return calling
            if tools.required:
                return family_named(FOREIGN)
        return family_of(self.text)

    def _grammar(self, family: Family, content: GrammarSpec | None) -> GrammarSpec | None:
        """Of the whole answer, of which ``content`` may have to be of a grammar."""
        tools = self.tools
        if content is None and not (tools.required or tools.strict):
            return None
        special_tokens = {one: id_ for id_, one in self.text.special_tokens.items()}
        calls = None
        if tools.allowed and family.name in FORCED:
            calls = rules_of_tools(
                family.name,
                [*tools.described()],
                special_tokens,
                parallel=self.max_calls is None,
            )
        answers = AnswerGrammar(
            family=family,
            special_tokens=special_tokens,
            reasoning=self._reasoning(family),
            continues=self.continues,
        )
        if calls is not None and tools.required:
            return answers.of_calls(calls)
        if content is not None:
            return answers.of_content(content, calls)
        return None if calls is None else answers.of_text_with_calls(calls)

    def _reasoning(self, family: Family) -> Reasoning | None:
        """What the answer may begin with: reasoning that the prompt has begun, or the model does.

        Of a model that has no word for it in its template, none is expected.
        """
        parser = AnswerParser(family, self.prompt, self.tools.allowed)
        if parser.reasoning is not None:
            return Reasoning(region=parser.reasoning, has_begun=True)
        for region in family.regions if parser.is_fresh and not self.continues else ():
            if region.kind is Kind.REASONING and any(map(self._knows, region.opens)):
                return Reasoning(region=region, has_begun=False)
        return None

    def _knows(self, opener: str) -> bool:
        """Whether the template has it, or the vocabulary a token that it begins with."""
        tokens = [one for one in self.text.added_tokens if one.strip()]
        return opener.strip() in self.text.templates or opener.startswith((*tokens,))

    def _shown(self, family: Family) -> set[str]:
        """Special tokens that the answer's parser has to see."""
        markers = family.markers(tools=bool(self.tools.allowed))
        special = self.text.special_tokens.values()
        return {one for one in special if any(one in marker for marker in markers)}


def count_tokens(tokens: Sequence[int], images: Sequence[bytes]) -> int:
    """Of a prompt. Raises ApiError if it has images, whose tokens only an engine can tell."""
    if images:
        raise ApiError(
            400,
            "The tokens of images are known once they are looked at: ask for an answer, whose "
            "usage has them, or count without the images.",
            code="unsupported_content",
        )
    return len(tokens)


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
    arguments = dict(chat.arguments)
    if own := sorted(_OWN_ARGUMENTS & arguments.keys()):
        raise ApiError(
            400,
            f"chat_template_kwargs has {own[0]!r}, which the server gives the template itself; use "
            "the request's own field for it.",
            param="chat_template_kwargs",
        )
    if chat.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", chat.reasoning_effort)
        if chat.reasoning_effort == "none":
            arguments.setdefault("enable_thinking", False)
    images = text.images()
    messages = for_template(chat.messages, images)
    images.check()
    rendered = _rendered(
        text,
        messages,
        tools=tools.allowed or None,
        documents=chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        template=chat.template,
        arguments=arguments,
    )
    # The template has written what begins a text.
    tokens = text.encode(rendered, special=False)
    text.check_places(tokens, len(images.data))
    return ChatPrompt(
        text,
        tokens,
        rendered,
        tools,
        None if chat.parallel_tool_calls and not tools.single else 1,
        chat.continue_final_message,
        images.data,
    )


def _rendered(text: ModelText, messages: Sequence[dict[str, Any]], **how: Any) -> str:  # noqa: ANN401
    """The messages in the template, without the loss of any that tells the model something.

    Agents send system messages in the middle of a chat, and several of the user's side by side.
    Some templates refuse them, and some leave system messages out: these get what :func:`in_turns`
    makes of the messages. Raises InvalidInputError if the template takes none of it.
    """
    forms = [[*messages], in_turns(messages), in_turns(messages, first_system=False)]
    refused: InvalidInputError | None = None
    for at, form in enumerate(forms):
        if form in forms[:at]:
            continue
        try:
            rendered = text.render(form, **how)
        except InvalidInputError as error:
            refused = refused or error
            continue
        if not _has_system(text, form, rendered, **how):
            continue
        results = _places_of("tool", form)
        if results and not _has(text, form, results, rendered, **how):
            raise ApiError(
                400,
                f"messages has results of tools, which the chat template of {text.name} leaves "
                "out; ask a model that knows tools, or send the results as the user's.",
                param="messages",
            )
        return rendered
    raise refused or InvalidInputError(
        f"The chat template of {text.name} leaves out system messages; send them as the user's."
    )


def _has_system(
    text: ModelText,
    messages: list[dict[str, Any]],
    rendered: str,
    **how: Any,  # noqa: ANN401
) -> bool:
    for at in _places_of("system", messages):
        content = messages[at]["content"]
        is_told = len(content) >= LONG_CHARACTERS and content.strip() in rendered
        if not is_told and not _has(text, messages, {at}, rendered, **how):
            return False
    return True


def _places_of(role: str, messages: list[dict[str, Any]]) -> set[int]:
    """Where one of that role says something."""
    said = {at for at, one in enumerate(messages) if one["role"] == role}
    return {at for at in said if messages[at]["content"].strip()}


def _has(
    text: ModelText,
    messages: list[dict[str, Any]],
    places: set[int],
    rendered: str,
    **how: Any,  # noqa: ANN401
) -> bool:
    """Whether the template's text would be another without the contents in ``places``."""
    emptied = [{**one, "content": ""} if at in places else one for at, one in enumerate(messages)]
    try:
        return text.render(emptied, **how) != rendered
    except InvalidInputError:
        return True
