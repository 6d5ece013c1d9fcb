"""``expert-run chat``: a conversation in the terminal."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from expertd_inference.cli import options
from expertd_inference.cli.chat_client import ChatClient
from expertd_inference.cli.conversation import COMMANDS, Conversation, answer_stdin, converse
from expertd_inference.cli.served import ServerChild
from expertd_inference.cli.text_output import TextOutput, status
from expertstore.interrupts import interruptible

DEFAULT_URL = "http://127.0.0.1:8080"
LOOK_SECONDS = 2.0
"""How long a server at the default URL may take to say that it is there."""


def chat(
    url: Annotated[
        str | None,
        typer.Option(
            help=f"The server to talk to. Default: {DEFAULT_URL} if one is there; else one is "
            "started for the daemon's models, and stopped at the end.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model that it serves; not needed if it is the only one."),
    ] = None,
    embedded: Annotated[
        Path | None,
        typer.Option(
            help="Without a server and a daemon: start both for this pack, and stop them at the "
            "end.",
            metavar="PACK",
            readable=False,
            rich_help_panel=options.DAEMON,
            callback=options.find_pack,
        ),
    ] = None,
    ram: options.Ram = None,
    socket: options.Socket = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before all else.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="0 takes the likeliest token each time. Default: the checkpoint's, or 1.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="End an answer after so many tokens.")
    ] = None,
    chat_template: options.ChatTemplate = None,
    experts_per_token: options.ExpertsPerToken = None,
    expert_threshold: options.ExpertThreshold = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EXPERTD_API_KEY", help="Your key, if the server wants one."),
    ] = None,
) -> None:
    '''Talk with a model; what is piped to stdin is one message.

    /reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer; """ begins and ends
    a message of several lines.

    [bold]Examples[/bold]

      expert-run chat --embedded ./mixtral-pack

      expert-run chat --model mixtral --system "Answer in one sentence."

      git diff | expert-run chat --url http://lab:8080 --system "Review this."
    '''
    options.check_places(ram, url=url, embedded=embedded, socket=socket)
    output = TextOutput(json=False, stream=False)
    with interruptible(), ExitStack() as stack:
        own: list[str] = ["--drain-seconds", "0"]
        if chat_template is not None:
            own += ["--chat-template", str(chat_template)]
        if embedded is not None:
            own += ["--embedded", str(embedded)]
            own += [] if ram is None else ["--ram", ram]
        elif socket is not None:
            own += ["--socket", socket]
        elif url is None and ChatClient(DEFAULT_URL).answers(LOOK_SECONDS):
            url = DEFAULT_URL
        if url is None:
            if model is not None and embedded is None:
                own += ["--preload", model]
            with status("Starting a server"):
                url = stack.enter_context(ServerChild(own)).url
        client = ChatClient(url, api_key)
        fields: dict[str, Any] = {"model": client.model(model)}
        wishes = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "experts_per_token": experts_per_token,
            "expert_threshold": expert_threshold,
        }
        fields |= {name: value for name, value in wishes.items() if value is not None}
        conversation = Conversation(client, output, system=system, fields=fields)
        if sys.stdin.isatty():
            output.say(f"{fields['model']} at {url}: {COMMANDS}.")
            converse(conversation, output)
        else:
            answer_stdin(conversation, output)
