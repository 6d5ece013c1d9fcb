"""FreeToken as a peer, on a GPU host: the speed of a running ``ft serve``, by its HTTP interface.

It serves real checkpoints only, with their tokenizer and chat template, so it takes no part in
``python -m bench peers``, whose weights are random. Give ours a pack of the same checkpoint and
compare with ``expert-run generate --device cuda --json``. Written from FreeToken's quick start;
**never run**: there was no GPU. It imports nothing of ours and needs only Python::

    uv pip install "freetoken[accel]"        # in a virtual environment of its own
    ft serve --model ~/models/Qwen3.6-35B-A3B
    python bench/peers/freetoken.py run '{"tokens": 128}'

It prints one JSON object: ``first_seconds`` until the first piece of text, and
``tokens_per_second`` after it, by the count of tokens that the server gives, or else by pieces.
"""

import json
import sys
import time
import urllib.error
import urllib.request

_PROMPT = "What is a Mixture-of-Experts model? Explain it at length."
_SECONDS = 300.0


def run(url: str = "http://127.0.0.1:1919", tokens: int = 128) -> None:
    """Asks once to warm up, then once more."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=_SECONDS) as answer:
            model = json.load(answer)["data"][0]["id"]
        _ask(url, model, 8)
        print(json.dumps(_ask(url, model, tokens)))
    except (urllib.error.URLError, TimeoutError) as error:
        sys.exit(f"No FreeToken answers at {url} ({error}); docs/peers.md says how to start one.")


def _ask(url: str, model: str, tokens: int) -> dict[str, float]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began, times, count = time.monotonic(), [], 0
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        for raw in answer:
            line = raw.decode().strip()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            count = (event.get("usage") or {}).get("completion_tokens", count)
            delta = event["choices"][0]["delta"] if event.get("choices") else {}
            if delta.get("content") or delta.get("reasoning_content"):
                times.append(time.monotonic())
    if len(times) < 2:
        sys.exit(f"FreeToken at {url} gave {len(times)} pieces of text; ask for more tokens.")
    rate = ((count or len(times)) - 1) / (times[-1] - times[0])
    return {"first_seconds": times[0] - began, "tokens_per_second": rate}


if __name__ == "__main__":
    {"run": run}[sys.argv[1]](**json.loads(sys.argv[2]))
