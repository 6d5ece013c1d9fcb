"""Takes the pictures of docs/serving.md: `make screenshots`.

The server and its numbers are real; the chat's answer is written here, since the example model
knows nothing but Python's library.
"""

import json
import tempfile
import threading
from pathlib import Path

import httpx2
from playwright.sync_api import Browser, Page, Route, expect

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.browser import chromium
from expertd_testing.server import serving_http

DOCS = Path(__file__).parent
EXAMPLE = DOCS.parent / "examples/tiny-mixtral"
SIZE = {"width": 1200, "height": 860}
MOST_BYTES = 150 << 10
RAM = "3MiB"
"""Less than the model, so that the page has reads and experts outside of RAM to show."""
NUM_CLIENTS = 6
WATCH_MILLISECONDS = 25_000

QUESTION = "How does a router choose the experts of a token? Show it in Python."
REASONING = "A short function says it best, and a table what its arguments are."
ANSWER = """\
The router gives every expert a **score**, keeps the best `k`, and weighs their outputs by a softmax over these:

```python
def route(scores, k=2):
    # The k best experts, and how much each one counts.
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
    powers = [math.exp(scores[i]) for i in best]
    return [(i, p / sum(powers)) for i, p in zip(best, powers)]
```

| model | experts of a layer | of which a token uses |
|---|---|---|
| Mixtral 8x7B | 8 | 2 |
| Qwen3 30B-A3B | 128 | 8 |

So a token touches *few* of a model's experts, and the others can wait in memory or on disk.
"""  # noqa: E501


def main() -> None:
    """Packs the example model, serves it, and takes both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / EXAMPLE.name
        pack(Request(EXAMPLE, packed, choose_scheme("4bit", None, None), optimize=False))
        arguments = ("--embedded", packed, "--kv-tokens", "16384", "--ram", RAM)
        with serving_http(*arguments) as server, chromium() as browser:
            _chat(browser, server.url)
            _host(browser, server.url)


def _chat(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport=SIZE, color_scheme="light")
    pieces = [{"reasoning_content": REASONING}, {"content": ANSWER}]
    chunks = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def fulfill(route: Route) -> None:
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", fulfill)
    page.goto(url)
    expect(page.locator("#model option")).to_have_count(1)
    for question in ("What is a KV cache?", "Plan a talk on sparse models", QUESTION):
        page.get_by_role("button", name="New conversation").first.click()
        page.get_by_label("Your message").fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.locator("article footer .note").evaluate_all("all => all.forEach(one => one.remove())")
    page.mouse.move(700, 500)
    _take(page, "chat.png")


def _host(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={**SIZE, "height": 1180}, color_scheme="dark")
    page.goto(f"{url}/host")
    ended = threading.Event()
    clients = [threading.Thread(target=_client, args=(url, n, ended)) for n in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        page.wait_for_timeout(WATCH_MILLISECONDS)
        _take(page, "host.png")
    finally:
        ended.set()
        for client in clients:
            client.join()


def _client(url: str, number: int, ended: threading.Event) -> None:
    """Asks again and again, for texts of different lengths."""
    count = 0
    while not ended.wait(0.4 * number):
        count += 1
        length = 30 + 37 * (number + count) % 150
        body = {"prompt": [40 + number] * 100, "max_tokens": length, "ignore_eos": True}
        httpx2.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


def _take(page: Page, name: str) -> None:
    picture = page.screenshot()
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"{name} has {len(picture)} bytes, more than {MOST_BYTES}.")
    (DOCS / name).write_bytes(picture)
    print(f"{DOCS / name}: {len(picture)} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
