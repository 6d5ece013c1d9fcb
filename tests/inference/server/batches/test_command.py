"""``expert-run batch`` as a user meets it, killed and interrupted as well."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from expertd_inference.cli.commands import app
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.server import Server
from tests.inference.conftest import Make
from tests.inference.server.batches.lines import answers_of, request, write_lines

COMMAND = [sys.executable, "-c", "from expertd_inference.cli import main; main()", "batch"]
FULL = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); {COMMAND[2]}"
"""The same, where no file may have more bytes."""
KILLS = 4


def start(*arguments: str | Path, command: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def until_there_are(num_lines: int, path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= num_lines:
            return
        time.sleep(0.005)


def test_killed_at_any_moment_it_loses_nothing_and_asks_nothing_twice(
    server: Server, tmp_path: Path
) -> None:
    requests: list[Any] = [request(f"r{number}", max_tokens=4) for number in range(60)]
    requests[7] = request("r7", max_tokens=-1)
    requests[8] = request("r8", stream=True)
    source, target = write_lines(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    arguments = (source, target, "--url", server.url, "--at-once", "4")
    chance = random.Random(14)
    for kill in range(KILLS):
        before = target.read_bytes() if target.exists() else b""
        process = start(*arguments)
        until_there_are(before.count(b"\n") + kill, target, process)
        time.sleep(chance.random() * 0.02)
        process.kill()
        ended(process)
        after = target.read_bytes() if target.exists() else b""
        assert after.startswith(before[: before.rfind(b"\n") + 1])
    before = target.read_bytes()
    asked = num_answered(server)
    code, out, err = ended(start(*arguments, "--json"))
    assert code == 2
    assert err.endswith(f"2 of 60 requests failed; their lines in {target} say why.\n")
    found = answers_of(target.read_text())
    assert len(found) == 60
    assert {name for name, line in found.items() if line["error"]} == {"r8"}
    assert found["r7"]["response"]["status_code"] == 400
    assert "max_tokens" in found["r7"]["response"]["body"]["error"]["message"]
    totals = json.loads(out)
    assert totals["num_before"] == before.count(b"\n") > 0
    assert totals["num_answered"] == 60 - totals["num_before"]
    left = [line for line in target.read_bytes()[len(before) :].splitlines() if b'"usage"' in line]
    assert totals["new_tokens"] == 4 * len(left)
    assert num_answered(server) - asked == len(left)
    assert target.read_bytes().startswith(before)


def num_answered(server: Server) -> int:
    """How many requests it has answered, once it has let go of those whose client is gone."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        text = httpx2.get(f"{server.url}/metrics").text
        begun, ended, failed = (
            sum(int(float(number)) for number in re.findall(rf"(?m)^{name}{{.* (\S+)$", text))
            for name in (
                "vllm:request_prompt_tokens_count",
                "vllm:request_generation_tokens_count",
                "expertd:sequence_failures_total",
            )
        )
        if begun == ended + failed:
            return ended
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_is_said_and_the_next_run_does_the_rest(server: Server, tmp_path: Path) -> None:
    requests = [request(f"r{number}", max_tokens=4) for number in range(6)]
    source, target = write_lines(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    arguments = (source, target, "--url", server.url, "--at-once", "2")
    returncode, _, err = ended(start(*arguments, command=(*COMMAND[:2], FULL, "batch")))
    assert returncode == 2
    assert f"{target} cannot be written: File too large; start again once it can" in err
    before = answers_of(target.read_text())
    assert 0 < len(before) < 6
    returncode, _, err = ended(start(*arguments))
    assert returncode == 0, err
    after = answers_of(target.read_text())
    assert len(after) == 6
    assert after.items() >= before.items()


def test_ctrl_c_leaves_whole_lines_and_the_next_run_does_the_rest(
    packed: Make, tmp_path: Path
) -> None:
    requests = [request(f"r{number}", max_tokens=64) for number in range(24)]
    source, target = write_lines(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    arguments = (source, target, "--embedded", packed("example", "4bit"), "--at-once", "1")
    process = start(*arguments, "--json")
    until_there_are(2, target, process)
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert code == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    before = target.read_bytes()
    assert before.endswith(b"\n")
    assert json.loads(out)["num_answered"] == before.count(b"\n") < 24
    code, out, err = ended(start(*arguments, "--at-once", "8"))
    assert (code, out) == (0, "")
    assert f"{24 - before.count(10)} of 24 requests answered" in err
    found = answers_of(target.read_text())
    texts = {line["response"]["body"]["choices"][0]["text"] for line in found.values()}
    assert len(found) == 24
    assert all(texts)
    code, out, _ = ended(start(*arguments, "--json"))
    assert (code, json.loads(out)["num_before"]) == (0, 24)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--url", "http://a", "--embedded", "pack"), "Choose one of --url, --socket and"),
        (("--url", "http://a", "--ram", "1GiB"), "--ram belongs to --embedded"),
        (("--url", "nowhere"), "--url 'nowhere' is no URL of a server"),
        (("--embedded", "nowhere"), "nowhere"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", [request("a")])
    command = ["batch", str(source), str(tmp_path / "out.jsonl"), *arguments]
    assert why in str(CliRunner().invoke(app, command).exception)
