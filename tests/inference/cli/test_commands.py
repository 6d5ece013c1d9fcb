"""``expert-run`` as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expertd.cli import pack as pack_command
from expertd_testing.daemon import Daemon, serving
from expertd_testing.forked_command import ForkedCommand
from expertstore.errors import InvalidInputError
from expertstore.pack.manifest import read_manifest
from expertstore.trace import TraceReader
from tests.inference.greedy import greedy

Make = Callable[..., Any]

COMMAND = [sys.executable, "-c", "from expertd_inference.cli import main; main()"]
ON_FAKES = [sys.executable, "-m", "expertd_testing.expert_run"]
"""The command that also offers fake devices."""
QUICK = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy']))"
AT_ONCE = [sys.executable, "-c", f"{QUICK}; from expertd_inference.cli import main; main()"]
"""The command where whatever takes long to import cannot be imported."""
WITH_TORCH = """
from expertd_inference.process.environment import prepare_environment
prepare_environment(device="fake:0")
import expertd_inference.generation
import expertd_inference.worker
import transformers.modeling_layers
import transformers.models.auto.tokenization_auto
"""
ONE_AFTER_THE_OTHER = """
import os
import sys

import expertd_inference.cli.commands
from expertd_inference.cli import main

for arguments in sys.stdin.read().splitlines():
    if not arguments:
        from expertd_testing.fake_device import offer_fake_devices
        offer_fake_devices()
        continue
    if (child := os.fork()) == 0:
        sys.argv[1:] = arguments.split()
        main()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("code", code, file=sys.stderr, flush=True)
"""
"""Commands, each in a fork of a process that has imported what they need.

After an empty line they are offered fake devices.
"""


def run(
    *arguments: str | Path, stdin: bytes | None = None, command: list[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*command, *map(str, arguments)], input=stdin, capture_output=True, timeout=120
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def one_after_the_other(imports: str, commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes, and what each command, none of which prints anything, says on stderr."""
    done = run(
        stdin="\n".join(commands).encode(),
        command=[sys.executable, "-c", imports + ONE_AFTER_THE_OTHER],
    )
    assert (done.returncode, done.stdout) == (0, "")
    *parts, rest = re.split(r"code (-?\d+)\n", done.stderr)
    assert not rest
    return [(int(code), said) for said, code in zip(parts[::2], parts[1::2], strict=True)]


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("expert-run: ")
    assert done.stderr.count("\n") == 1, "one sentence"
    assert message in done.stderr


@pytest.fixture(scope="module")
def daemon(packed: Make) -> Iterator[Daemon]:
    with serving({"tiny": packed("example"), "mixtral": packed("mixtral")}) as daemon:
        yield daemon


def run_forked(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """As :func:`run`, in a fraction of the time."""
    process = ForkedCommand(*arguments, stdin=stdin)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode is not None
    return subprocess.CompletedProcess(
        process.arguments, process.returncode, stdout.decode(), stderr.decode()
    )


def generate(
    daemon: Daemon, *arguments: str | Path, command: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    whole = ("generate", "--socket", daemon.socket, *arguments)
    return run_forked(*whole) if command is None else run(*whole, command=command)


PROMPT = "def __repr__(self):"
"""After which, for 20 tokens, the likeliest is well ahead, so that no rounding decides."""


def test_json(daemon: Daemon, stock: Make, packed: Make) -> None:
    from transformers import AutoTokenizer

    arguments = ("--model", "tiny", "-p", PROMPT, "--max-new-tokens", "20", "--json")
    done = generate(daemon, *arguments, command=COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no noise"
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result.keys() == {
        "text",
        "tokens",
        "prompt_tokens",
        "new_tokens",
        "ttft_seconds",
        "tokens_per_second",
        "host_hits",
        "nvme_misses",
        "pack_reads",
        "remote_misses",
        "peak_pss_bytes",
        "kernels",
        "executor",
        "finish_reason",
        "reason",
        "rows_mean",
        "experts_mean",
        "native_rows",
        "hints",
        "device",
    }
    tokenizer = AutoTokenizer.from_pretrained(packed("example"))
    prompt = tokenizer(PROMPT).input_ids
    assert result["tokens"] == greedy(stock("example"), prompt, 20)
    assert result["text"] == tokenizer.decode(result["tokens"])
    assert result["prompt_tokens"] == len(prompt)
    assert result["new_tokens"] == 20
    assert 0 < result["ttft_seconds"] < 100
    assert result["tokens_per_second"] > 0
    needed = result["host_hits"] + result["nvme_misses"]
    assert needed >= 20 * 2 * 6
    assert result["experts_mean"] == 2
    few = json.loads(generate(daemon, *arguments, "--experts-per-token", "1").stdout)
    assert few["experts_mean"] == 1
    assert few["host_hits"] + few["nvme_misses"] < 0.7 * needed
    assert result["peak_pss_bytes"] > 10 << 20


def test_text_and_stdin(daemon: Daemon) -> None:
    done = run_forked(
        *("generate", "--socket", daemon.socket, "--model", "tiny", "--prompt", "-"),
        *("--max-new-tokens", "8", "--dtype", "float32", "--threads", "1"),
        stdin=PROMPT.encode(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")


def test_a_trace_is_what_a_pack_is_pruned_by(daemon: Daemon, packed: Make, tmp_path: Path) -> None:
    texts, trace = tmp_path / "texts.jsonl", tmp_path / "trace.csv"
    texts.write_text('{"prompt": "import os"}\n\n{"tokens": [1, 2, 3]}\n')
    place = ("--socket", daemon.socket, "--model", "mixtral")
    done = run_forked("trace", texts, trace, *place)
    num_tokens = len("import os") + 3
    said = f"expert-run: wrote {num_tokens} tokens of 2 texts to {trace}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
    assert trace.stat().st_mode & 0o777 == 0o600
    with TraceReader(trace) as reader:
        rows = [*reader]
    assert len(rows) == num_tokens * 3, "of three layers"
    assert {len(row.experts) for row in rows} == {2}
    assert all(min(row.weights) > 0 for row in rows)
    share = ("--prune", trace, "--keep-experts", "0.75")
    app = typer.Typer()
    pack_command.register(app)
    command = CliRunner().invoke(app, [*map(str, (packed("mixtral"), tmp_path / "few", *share))])
    assert command.exit_code == 0, command.output
    assert read_manifest(tmp_path / "few").manifest.layers[0].num_experts == 6
    for more in (("--scheme", "4bit"), ("--prune-by", "counts", "--keep-experts", "1")):
        wrong = (packed("mixtral"), tmp_path / "x", *share, *more)
        refused = CliRunner().invoke(app, [*map(str, wrong)])
        assert isinstance(refused.exception, InvalidInputError)


def test_many_prompts_of_a_file(daemon: Daemon, packed: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "prompts.jsonl"
    file.write_text(
        f'{{"prompt": "{PROMPT}", "max_new_tokens": 5}}\n'
        '{"tokens": [1, 2, 3], "stop_tokens": [7]}\n'
        '{"tokens": [1000000]}\n'
    )
    arguments = ("--model", "tiny", "--prompt-file", file, "--max-new-tokens", "3", "--json")
    done = generate(daemon, *arguments, "--max-sequences", "2", "--kv-tokens", "512", "--exact")
    assert done.returncode == 2
    started, ended = done.stderr.splitlines()
    assert started.startswith("expert-run: executor ")
    assert ended == "expert-run: 1 of 3 prompts failed; their lines say why (error)."
    *results, totals = map(json.loads, done.stdout.splitlines())
    by_line = {result["line"]: result for result in results}
    assert by_line.keys() == {1, 2, 3}
    tokenizer = AutoTokenizer.from_pretrained(packed("example"))
    assert by_line[1]["prompt_tokens"] == len(tokenizer(PROMPT).input_ids)
    assert by_line[1]["new_tokens"] == 5
    assert by_line[1]["text"] == tokenizer.decode(by_line[1]["tokens"])
    assert by_line[2]["new_tokens"] <= 3
    assert "token 1000000" in by_line[3]["error"]
    assert (totals["num_prompts"], totals["num_failed"]) == (3, 1)
    assert totals["engine"]["rows_mean"] > 1
    assert totals["engine"]["kv_tokens"] == 512


def test_embedded_with_stream(packed: Make) -> None:
    done = run_forked(
        *("generate", "--embedded", packed("example"), "--ram", "16MiB", "-p", PROMPT),
        *("--max-new-tokens", "8", "--json", "--stream"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stderr.rstrip("\n") == result["text"].rstrip("\n")
    assert result["nvme_misses"] > 0


def test_embedded_daemon_that_is_killed(packed: Make) -> None:
    pack = packed("example")
    process = ForkedCommand(
        *("generate", "--embedded", pack, "-p", PROMPT, "--json", "--stream"),
        *("--max-new-tokens", "900"),
    )
    wait_for_text(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stdout == b""
    assert stderr.decode().splitlines()[-1] == "expert-run: The daemon is gone."


def test_no_daemon(tmp_path: Path) -> None:
    done = run("generate", "--socket", tmp_path, "--model", "m", "-p", "x", command=AT_ONCE)
    assert_refused(done, str(tmp_path))


def test_socket_that_nobody_serves(packed: Make) -> None:
    with serving({"m": packed("mixtral")}) as daemon:
        daemon.kill()
        done = generate(daemon, "--model", "m", "-p", "x", command=AT_ONCE)
        assert_refused(done, str(daemon.socket))


def test_unknown_model(daemon: Daemon) -> None:
    done = generate(daemon, "--model", "nope", "-p", "x", command=AT_ONCE)
    assert_refused(done, "'nope'; there are: mixtral, tiny")


def test_wrong_arguments() -> None:
    refused = {
        "--embedded /tmp": "is not a pack",
        "--embedded /nonexistent/pack": "is not a pack",
        "--embedded /tmp --model m": "--embedded and --model",
        "--ram 8GiB": "--ram belongs to --embedded",
        "--top-p 0": "top_p",
        "--seed -1": "seed",
        "--prompt-file x": "Give one of --prompt and --prompt-file",
        "--stream --prompt-file x": "--stream shows one text; with --prompt-file, leave",
        "--kv-tokens 10": "kv_tokens is 10, too few for one sequence; give at least 64",
        "--exact --kernels reference --embedded /tmp": "is not a pack",
        f"--socket /{'x' * 120} --model m": "at most 107",
    }
    done = one_after_the_other(QUICK, [f"generate -p x {one}" for one in refused])
    for (arguments, message), (code, said) in zip(refused.items(), done, strict=True):
        assert code == 2, arguments
        assert said.startswith("expert-run: ")
        assert said.count("\n") == 1, "one sentence"
        assert message in said


def test_ram_too_small(packed: Make) -> None:
    arguments = ("--embedded", packed("mixtral"), "--ram", "100KiB")
    done = run("generate", "-p", "x", *arguments, command=AT_ONCE)
    assert_refused(done, "too small")


def test_chat_without_template(daemon: Daemon) -> None:
    assert_refused(generate(daemon, "--model", "mixtral", "--chat", "-p", "x"), "chat template")


def test_prompt_that_is_no_text(daemon: Daemon) -> None:
    done = run("generate", "--socket", daemon.socket, "-p", "-", stdin=b"\xff\xfe", command=AT_ONCE)
    assert_refused(done, "not UTF-8")


@pytest.mark.parametrize(
    ("redirections", "message"),
    [
        (">&-", "stdout is closed"),
        ("<&- >&-", "stdout is closed"),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", "No expertd answers"),
        ("2>/dev/full", ""),
    ],
)
def test_streams_that_are_none(redirections: str, message: str, tmp_path: Path) -> None:
    command = [*AT_ONCE, "generate", "--socket", str(tmp_path), "-p", "x"]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *command], capture_output=True, timeout=60
    )
    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert len(lines) == bool(message)
    assert not message or message in lines[0]


def test_an_output_without_room() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*AT_ONCE, "--help"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "expert-run: The output cannot be written: No space left on device.\n"
    )


def test_bytes_in_arguments_that_are_no_text(tmp_path: Path) -> None:
    for option in ("-p", "--model", "--socket"):
        values = {"--socket": str(tmp_path), "-p": "x", "--model": "m"} | {option: b"caf\xe9"}
        done = subprocess.run(
            [*AT_ONCE, "generate", *(part for pair in values.items() for part in pair)],
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == 1
        assert (b"not UTF-8" in done.stderr) == (option == "-p")


def test_usage() -> None:
    wrong = ["--prompt", "--max-new-tokens 0", "--max-new-tokens many", "--dtype int8"]
    wrong += ["--temperature nan", "--no-such-option"]
    done = one_after_the_other(QUICK, [f"generate -p x {one}" for one in wrong])
    for arguments, (code, said) in zip(wrong, done, strict=True):
        assert code == 2, arguments
        assert "Error" in said
        assert "Traceback" not in said


def test_a_prompt_is_needed() -> None:
    done = run("generate", command=AT_ONCE)
    assert (done.returncode, done.stderr) == (
        2,
        "expert-run: Give one of --prompt and --prompt-file.\n",
    )


def test_help_and_version_come_at_once() -> None:
    for arguments, words in (
        ("--help", ""),
        ("generate --help", "expert-run generate --embedded"),
        ("advise --help", "expert-run advise --model mixtral-8x7b"),
        ("--version", "expert-run "),
    ):
        done = run(*arguments.split(), command=AT_ONCE)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert words in done.stdout


def test_daemon_killed_while_it_generates(packed: Make, stock: Make) -> None:
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        socket = Path(directory) / "s"
        models = {"tiny": packed("example")}
        with serving(models, socket=socket) as daemon:
            process = start(socket, "--max-new-tokens", "200", "--reattach-seconds", "60")
            wait_for_text(process)
            daemon.kill()
        time.sleep(0.3)
        with serving(models, socket=socket):
            stdout, stderr = process.communicate(timeout=120)
            expected = generate_json(socket, "--max-new-tokens", "200")
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["tokens"] == expected["tokens"]
    assert stderr.count(b"expert-run: daemon gone, waiting to re-attach\n") == 1


def test_daemon_that_stays_away(packed: Make) -> None:
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        socket = Path(directory) / "s"
        with serving({"tiny": packed("example")}, socket=socket) as daemon:
            process = start(socket, "--max-new-tokens", "900", "--reattach-seconds", "0.5")
            wait_for_text(process)
            daemon.kill()
            stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == b"", "no half object"
    assert b"Traceback" not in stderr
    lines = stderr.decode().splitlines()
    # The text that came before it may have been cut in a line, and what was held back may follow.
    assert any(line.endswith("expert-run: daemon gone, waiting to re-attach") for line in lines)
    assert lines[-1].startswith("expert-run: The daemon is gone and none came back within 0.5 s")


def test_interrupted(daemon: Daemon) -> None:
    process = start(daemon.socket, "--max-new-tokens", "900")
    wait_for_text(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    result = json.loads(stdout)
    assert 0 < result["new_tokens"] < 900
    assert b"Traceback" not in stderr


def test_reader_that_leaves(daemon: Daemon) -> None:
    process = ForkedCommand(
        *("generate", "--socket", daemon.socket, "--model", "tiny", "-p", PROMPT)
    )
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in stderr


def start(socket: Path, *arguments: str) -> ForkedCommand:
    """A generation whose text goes to stderr while it comes."""
    return ForkedCommand(
        *("generate", "--socket", socket, "--model", "tiny", "-p", PROMPT),
        *("--json", "--stream", *arguments),
    )


def wait_for_text(process: ForkedCommand) -> None:
    assert process.stderr.read(1)


def generate_json(socket: Path, *arguments: str) -> dict[str, Any]:
    process = start(socket, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    result: dict[str, Any] = json.loads(stdout)
    return result


def test_device(daemon: Daemon, stock: Make) -> None:
    arguments = ["--model", "mixtral", "-p", "Once", "--max-new-tokens", "8", "--json"]
    plain = generate(daemon, *arguments)
    fakes = ["--device", "fake:0,fake:1", "--cache-bytes", "2MiB"]
    done = generate(daemon, *arguments, *fakes, command=ON_FAKES)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    ours, theirs = json.loads(done.stdout), json.loads(plain.stdout)
    assert ours["tokens"] == theirs["tokens"]
    assert theirs["device"] is None
    assert ours["device"]["copies"] > 0
    assert ours["device"]["nvme_misses"] == 0


def test_devices_that_cannot_be(daemon: Daemon) -> None:
    no_fakes = {"--device fake:0": "There is no device 'fake:0'; give cpu, or such as cuda:0."}
    fakes = {
        "--device tpu": "There is no device 'tpu'; give cpu",
        "--device fake:0 --cache-bytes 1MiB": "one token uses 2 experts of a layer, beside 4 ",
        "--device fake:0 --cache-bytes much": "--cache-bytes: ",
        "--device fake:0,": "not a list of different GPUs",
        "--speculate-layers 3 --staging-slots 2": "need 6; give as many, or guess less",
    }
    begin = f"generate --socket {daemon.socket} --model mixtral -p x"
    asked = [f"{begin} {arguments}" for arguments in (*no_fakes, *fakes)]
    done = one_after_the_other(WITH_TORCH, [*asked[:1], "", *asked[1:]])
    for (arguments, message), (code, said) in zip((no_fakes | fakes).items(), done, strict=True):
        assert code == 2, arguments
        assert said.startswith("expert-run: ")
        assert said.count("\n") == 1, "one sentence"
        assert message in said
