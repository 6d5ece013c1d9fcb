"""``expert-run chat`` as a user meets it, in a terminal and in a pipe."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_server

COMMAND = [sys.executable, "-c", "from expertd_inference.cli import main; main()", "chat"]
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}:{{ message.content }}]{% endfor %}"
    "{{ '<think>' if false }}"
)
THINKS = "<think>Hm.</think>\n\nYes."
SECONDS = 30.0


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture
def model(pack: Path) -> RecitedModel:
    return RecitedModel(ModelText("recited", pack, TEMPLATE))


@pytest.fixture
def url(pack: Path, model: RecitedModel) -> Iterator[str]:
    with reciting_server(pack, model) as url:
        yield url


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": ""}
        self._process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, wanted: str) -> str:
        """What the terminal shows up to ``wanted``."""
        deadline = time.monotonic() + SECONDS
        while wanted not in self._shown:
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, f"no {wanted!r} in {self._shown!r}"
            self._shown += os.read(self._ours, 4096).decode(errors="replace")
        shown, found, self._shown = self._shown.partition(wanted)
        return shown + found

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def interrupt_prompt(self) -> None:
        """Again and again: readline misses a signal between its prompt and its wait."""
        self.interrupt()
        while not select.select([self._ours], [], [], 1.0)[0]:
            self.interrupt()

    def wait(self) -> int:
        return self._process.wait(SECONDS)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(url: str) -> Iterator[Terminal]:
    terminal = Terminal("--url", url, "--system", "Be brief.")
    try:
        terminal.until("> ")
        yield terminal
    finally:
        terminal.close()


def piped(text: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=text,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_a_conversation(terminal: Terminal, model: RecitedModel) -> None:
    model.recitals += [THINKS, "Two.", "Three.", "Four."]
    terminal.type("One?\n")
    shown = terminal.until("> ")
    assert "\x1b[2mHm.\x1b[0m" in shown, "dimmed"
    assert "Yes." in shown
    terminal.type('"""two\n')
    terminal.until(". ")
    terminal.type('lines"""\n')
    assert "Two." in terminal.until("\n> ")
    assert model.prompts[1] == ("[system:Be brief.][user:One?][assistant:Yes.][user:two\nlines]")
    terminal.type("/help\n")
    assert "There is no /help: /reset forgets" in terminal.until("\n> ")
    terminal.type("/reset\n")
    terminal.until("\n> ")
    terminal.type("Three?\n")
    assert "Three." in terminal.until("\n> ")
    assert model.prompts[2] == "[system:Be brief.][user:Three?]"
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal: Terminal, model: RecitedModel
) -> None:
    model.endless = True
    model.recitals += ["Well", "Good."]
    terminal.type("One?\n")
    terminal.until("Well")
    terminal.interrupt()
    terminal.until("> ")
    terminal.interrupt_prompt()
    terminal.until("> ")
    model.endless = False
    terminal.type("Two?\n")
    assert "Good." in terminal.until("\n> ")
    assert model.prompts[1] == "[system:Be brief.][user:One?][assistant:Well][user:Two?]"
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_an_error_is_a_sentence_and_not_the_end(terminal: Terminal, model: RecitedModel) -> None:
    model.text.chat_template = "{{ raise_exception('No.') }}"
    terminal.type("One?\n")
    assert "does not take these messages: No;" in terminal.until("\n> ")
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_stdin_is_one_message(url: str, model: RecitedModel) -> None:
    model.recitals += [THINKS]
    done = piped(" One\ntwo \n", "--url", f"{url}/v1", "--temperature", "0.5", "--max-tokens", "50")
    assert (done.stdout, done.stderr, done.returncode) == ("Yes.\n", "", 0)
    assert model.prompts == ["[user:One\ntwo]"]
    assert model.settings[0].temperature == 0.5
    assert model.settings[0].max_new_tokens == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "lab:8080"], "'lab:8080' is no URL of a server"),
        (["--url", "http://127.0.0.1:9"], "No server answers at http://127.0.0.1:9/v1"),
        (["--url", "URL", "--model", "other"], "The server has no model 'other'"),
        (["--url", "URL", "--embedded", "x"], "Choose one of --url, --embedded and --socket"),
        (["--embedded", "/nowhere"], "The server did not start: /nowhere"),
        (["--url", "URL"], "stdin has no message"),
    ],
)
def test_refusals(url: str, arguments: list[str], message: str) -> None:
    done = piped("", *[url if one == "URL" else one for one in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("expert-run: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_pack_without_a_server(packed: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    done = piped(
        "def read_lines(path):",
        *("--embedded", packed("example", "4bit"), "--chat-template", template),
        *("--temperature", "0", "--max-tokens", "4"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
