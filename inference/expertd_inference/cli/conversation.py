"""A conversation in the terminal: lines in, answers out while they come."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

from expertd_inference.cli.chat_client import ChatClient, Delta
from expertd_inference.cli.text_output import TextOutput
from expertd_inference.settings import check_prompt
from expertstore.errors import ExpertdError, InvalidInputError

FENCE = '"""'
"""Begins and ends a message of several lines."""
COMMANDS = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Conversation:
    """What was said, and how answers are asked for; ``fields`` are those of the requests."""

    def __init__(
        self,
        client: ChatClient,
        output: TextOutput,
        *,
        system: str | None,
        fields: Mapping[str, Any],
    ) -> None:
        self._client = client
        self._output = output
        self._fields = fields
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._system]
        self._styles = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = [*self._system]

    def say(self, text: str) -> None:
        """Writes the answer to ``text`` as it comes. Raises ExpertdError if there is none.

        An answer that Ctrl-C stops is remembered as far as it came.
        """
        check_prompt(text)
        asked = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            with closing(self._client.answer(asked, self._fields)) as deltas:
                self._write(deltas, said)
        finally:
            if said:
                answer = {"role": "assistant", "content": "".join(said)}
                self.messages = [*asked, answer]

    def _write(self, deltas: Iterator[Delta], said: list[str]) -> None:
        """Writes them, and puts what is content into ``said``."""
        write = self._output.write
        assert write is not None
        reasons = False
        try:
            for delta in deltas:
                if delta.reasoning and sys.stdout.isatty():
                    if not reasons:
                        write(_DIM if self._styles else "")
                    reasons = True
                    write(delta.reasoning)
                if delta.content:
                    if reasons:
                        write((_PLAIN if self._styles else "") + "\n\n")
                        reasons = False
                    said.append(delta.content)  # first: Ctrl-C may come between the two
                    write(delta.content)
        finally:
            if reasons and self._styles:
                write(_PLAIN)


def converse(conversation: Conversation, output: TextOutput) -> None:
    """Answers lines from the terminal until the user ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history, and lines can be edited
    with _ctrl_c_interrupts():
        while True:
            try:
                text = _message(input)
            except EOFError:
                _break_line(output)
                return
            except KeyboardInterrupt:
                _break_line(output)
                continue
            match text.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/reset":
                    conversation.reset()
                    output.say("Begun anew.")
                    continue
                case command if command.startswith("/") and command[1:].isalpha():
                    output.say(f"There is no {command}: {COMMANDS}.")
                    continue
            try:
                conversation.say(text)
            except ExpertdError as error:
                output.say(str(error))
            except KeyboardInterrupt:
                pass
            _break_line(output)


def answer_stdin(conversation: Conversation, output: TextOutput) -> None:
    """Answers all of stdin as one message. Raises InvalidInputError if that is empty."""
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"The message is not UTF-8 text: {error}.") from error
    if not text:
        raise InvalidInputError("stdin has no message; write one, or chat in a terminal.")
    try:
        conversation.say(text)
    finally:
        output.end_line()
    output.end(None)


def _message(read: Callable[[str], str]) -> str:
    """A line, or the lines between two fences. Raises EOFError and KeyboardInterrupt."""
    line = read("> ")
    if not line.lstrip().startswith(FENCE):
        return line
    text = line.lstrip().removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        text += "\n" + read(". ")
    return text.rstrip().removesuffix(FENCE).strip("\n")


def _break_line(output: TextOutput) -> None:
    assert output.write is not None
    output.write("\n")


@contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """In the block Ctrl-C is KeyboardInterrupt, as often as it comes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
