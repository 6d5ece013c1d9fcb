"""README's way from a clone to a chat in the browser, as it stands there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

from tests.inference.conftest import Make

ROOT = Path(__file__).parents[3]
QUICK_START = (ROOT / "README.md").read_text().split("\n## ")[1]
ADDRESS = "http://127.0.0.1:8080"
CODE = re.compile(r"(?s)```python\n(from openai .*?)```")
CURL = re.compile(rf"(?s)\ncurl {ADDRESS}(/\S+) .*? -d '(.*?)'\n")


def found(pattern: str | re.Pattern[str]) -> re.Match[str]:
    match = re.search(pattern, QUICK_START)
    assert match is not None, pattern
    return match


def test_a_chat_in_the_browser(packed: Make, tmp_path: Path) -> None:
    pack = packed("example", "4bit")
    # All but what `make setup` did here, and the packing, which other tests do.
    given = ["--old-file=setup", "--old-file=native", f"BIN={Path(sys.executable).parent}"]
    given += [f"EXAMPLE_PACK={pack}", "PORT=0"]
    with subprocess.Popen(
        [*found(r"(?m)^make serve\b")[0].split(), *given],
        cwd=ROOT,
        env={
            # A make above this one has its say in MAKEFLAGS, and would be heard on stdout.
            **{name: value for name, value in os.environ.items() if "MAKE" not in name},
            "XDG_STATE_HOME": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            assert found(rf"(?m)^xdg-open {ADDRESS} ")
            with httpx2.Client(base_url=url, timeout=60) as client:
                assert client.get("/").headers["content-type"].startswith("text/html")
                messages = [{"role": "user", "content": found("type `(.*?)`")[1]}]
                body = {"messages": messages, "max_tokens": 8}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.json()["usage"]["prompt_tokens"] < 10, "the text alone"
                client.post(found(CURL)[1], content=found(CURL)[2]).raise_for_status()
            code = found(CODE)[1].replace(ADDRESS, url).replace("tiny-mixtral", pack.name)
            exec(code, {})
        finally:
            os.killpg(server.pid, signal.SIGTERM)
