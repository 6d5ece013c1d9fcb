"""The pages in a headless Chromium, with the example model behind them.

The browser's loop runs in this thread while it is open: no test here is asynchronous.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from expertd_testing.browser import chromium, find_chromium
from expertd_testing.server import Server

expect.set_options(timeout=20_000)
CHAT = "**/v1/chat/completions"
ANSWER = "#messages > article.assistant"
MARKDOWN = """\
## Title

Some **bold**, *slanted* and `code <b>` with [a link](https://example.org/x) and [a trap](javascript:alert(1)).

- one
  - inner
- two

3. three

| a | b |
|---|---|
| 1 | `2` |

```python
def f(x):  # comment
    return "text" + 12
```

<img src=x onerror="document.title='broken'"><script>document.title = 'broken'</script>
"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None and "NEEDS_CHROMIUM" not in os.environ:
        pytest.skip("There is no Chromium here; on Debian, apt-get install chromium.")
    with chromium() as started:
        yield started


@pytest.fixture
def context(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    """Of one test. No request may leave the server's host, and no script may fail."""
    made = browser.new_context(base_url=server.url, viewport={"width": 1200, "height": 800})
    asked: list[str] = []
    wrong: list[str] = []
    made.on("request", lambda request: asked.append(request.url))
    made.on("weberror", lambda error: wrong.append(str(error.error)))
    made.on(
        "console",
        lambda said: wrong.append(said.text) if "Security Policy" in said.text else None,
    )
    made.set_default_timeout(20_000)
    yield made
    made.close()
    assert asked
    assert not [url for url in asked if not url.startswith((server.url, "blob:"))]
    assert not wrong


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """The chat, once it knows the models."""
    opened = context.new_page()
    opened.goto("/")
    expect(opened.locator("#model option")).not_to_have_count(0)
    return opened


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def settings(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.keyboard.press("Escape")


def answers(page: Page, *pieces: dict[str, Any]) -> list[dict[str, Any]]:
    """The server answers with these pieces from now on; the bodies of requests, as they come."""
    bodies: list[dict[str, Any]] = []
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta}]} for delta in ({"role": "assistant"}, *pieces)
    ]
    chunks.append({"choices": [], "usage": {"completion_tokens": 7}})
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]

    def fulfill(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(body="".join(events), content_type="text/event-stream")

    page.route(CHAT, fulfill)
    return bodies


def test_a_chat_streams(page: Page) -> None:
    bodies: list[Any] = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.post_data else None)
    settings(page, System_prompt="Be brief.", Most_new_tokens="8", Temperature="0")
    ask(page, "Once upon a time")
    expect(page.locator("article.user .text")).to_have_text("Once upon a time")
    # Without tokens/s if all of them came at once.
    expect(page.locator(f"{ANSWER} footer")).to_contain_text(re.compile("8 tokens .*cut"))
    assert page.locator(f"{ANSWER} > .text").inner_text()
    expect(page.get_by_role("status")).to_contain_text("The answer is complete")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"]) == (8, 0)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert bodies[1]["messages"] == bodies[0]["messages"]
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Your message")).to_have_value("Once upon a time")
    ask(page, "The end")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert page.locator("article.user .text").all_inner_texts() == ["The end"]
    assert len(bodies) == 3


@pytest.mark.parametrize("way", ["Esc", "button"])
def test_stop(page: Page, http: httpx2.Client, way: str) -> None:
    def endless(route: Route) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route(CHAT, endless)
    ask(page, "Once")
    expect(page.locator(f"{ANSWER} > .text")).not_to_be_empty()
    if way == "Esc":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("The answer was stopped.")
    expect(page.locator(f"{ANSWER} footer")).to_contain_text("stopped")
    kept = page.locator(f"{ANSWER} > .text").inner_text()
    assert kept
    page.goto("/host")
    expect(page.locator(".card dd").first).to_have_text("0")
    (model,) = http.get("/host/state").json()["models"]
    (engine,) = model["engines"]
    assert engine["running"] == 0, "the server goes on for nobody"
    page.goto("/")
    expect(page.locator(f"{ANSWER} > .text")).to_contain_text(kept.split("\n")[0])


def test_conversations_stay(page: Page) -> None:
    answers(page, {"content": "Yes."})
    ask(page, "First?")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.get_by_role("button", name="New conversation").first.click()
    ask(page, "Second?")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    items = page.locator("#conversations .open")
    expect(items).to_have_text(["Second?", "First?"])
    items.last.hover()
    page.get_by_role("button", name="Rename First?").click()
    page.keyboard.type("Mine")
    page.keyboard.press("Enter")
    page.reload()
    expect(items).to_have_text(["Second?", "Mine"])
    expect(page.locator("article.user .text")).to_have_text("Second?")
    page.get_by_role("button", name="Mine", exact=True).click()
    expect(page.locator("article.user .text")).to_have_text("First?")
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(downloaded.value.path().read_text())
    assert {one["title"] for one in exported["conversations"]} == {"Second?", "Mine"}
    page.on("dialog", lambda dialog: dialog.accept())
    items.last.hover()
    page.get_by_role("button", name="Delete Mine").click()
    expect(items).to_have_text(["Second?"])
    expect(page.locator("article.user .text")).to_have_text("Second?")


def test_an_answer_goes_on_beside_another_conversation(page: Page) -> None:
    held: list[Route] = []
    page.route(CHAT, lambda route: held.append(route))
    ask(page, "Slow?")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("button", name="New conversation").first.click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    chunk = {"choices": [{"index": 0, "delta": {"content": "At last."}}]}
    held[0].fulfill(
        body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
    )
    expect(page.get_by_role("status")).to_contain_text("complete")
    expect(page.locator(ANSWER)).to_have_count(0)
    page.get_by_role("button", name="Slow?", exact=True).click()
    expect(page.locator(f"{ANSWER} > .text")).to_have_text("At last.")


def test_markdown_is_shown_and_no_markup_of_the_model_runs(page: Page) -> None:
    answers(page, {"content": MARKDOWN})
    ask(page, "Show <b>me</b>")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(page.locator("article.user .text")).to_have_text("Show <b>me</b>")
    text = page.locator(f"{ANSWER} > .text")
    assert text.locator("h4, strong, em, p > code").all_inner_texts() == [
        "Title", "bold", "slanted", "code <b>",
    ]  # fmt: skip
    link = text.locator("a")
    expect(link).to_have_count(1)
    assert link.get_attribute("href") == "https://example.org/x"
    assert "noopener" in (link.get_attribute("rel") or "")
    assert text.locator("ul > li > ul > li").all_inner_texts() == ["inner"]
    assert text.locator("ol").get_attribute("start") == "3"
    assert text.locator("th, td").all_inner_texts() == ["a", "b", "1", "2"]
    code = text.locator("pre code")
    assert code.inner_text() == 'def f(x):  # comment\n    return "text" + 12'
    assert {
        kind: code.locator(f".{kind}").all_inner_texts()
        for kind in ("keyword", "comment", "string", "number")
    } == {
        "keyword": ["def", "return"],
        "comment": ["# comment"],
        "string": ['"text"'],
        "number": ["12"],
    }
    assert text.locator("img, script").count() == 0
    assert "broken" not in page.title()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text.get_by_role("button", name="Copy").click()
    expect(text.get_by_role("button", name="Copied")).to_be_visible()
    assert "def f(x)" in page.evaluate("navigator.clipboard.readText()")


def test_what_comes_in_pieces_is_shown_as_what_comes_at_once(page: Page) -> None:
    shown = page.evaluate(
        """async (text) => {
        const { show } = await import("/pages/markdown.js");
        const [piece, whole] = [document.createElement("div"), document.createElement("div")];
        for (let end = 0; end <= text.length; end += 1) {
            show(piece, text.slice(0, end));
            whole.replaceChildren();
            show(whole, text.slice(0, end));
            if (piece.textContent !== whole.textContent) return text.slice(0, end);
        }
        return piece.isEqualNode(whole); }""",
        MARKDOWN,
    )
    assert shown is True


def test_text_that_is_no_markdown_keeps_its_lines(page: Page) -> None:
    answers(page, {"content": "def f(x):\n    return x"})
    ask(page, "f?")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert page.locator(f"{ANSWER} > .text").inner_text() == "def f(x):\n    return x"


def test_reasoning_is_folded(page: Page) -> None:
    bodies = answers(page, {"reasoning_content": "Hm, "}, {"reasoning": "so."}, {"content": "42"})
    ask(page, "What?")
    expect(page.locator(f"{ANSWER} > .text")).to_have_text("42")
    thought = page.locator(".reasoning .text")
    expect(thought).to_be_hidden()
    page.get_by_text("Reasoning").click()
    expect(thought).to_have_text("Hm, so.")
    ask(page, "And?")
    expect(page.locator(ANSWER)).to_have_count(2)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_an_error_is_a_sentence(page: Page) -> None:
    sentence = "The model example has no chat template; ask for a completion."
    body = json.dumps({"error": {"message": sentence}})
    page.route(CHAT, lambda route: route.fulfill(status=400, body=body))
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.get_by_role("alert")).to_contain_text("another model")
    page.unroute(CHAT)
    full = json.dumps({"error": {"message": "This model's maximum context length is 9 tokens."}})
    page.route(CHAT, lambda route: route.fulfill(status=400, body=full))
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text("begin a new one")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    page.unroute(CHAT)
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half"}}]}
    broken = f"data: {json.dumps(chunk)}\n\ndata: {body}\n\ndata: [DONE]\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.locator(f"{ANSWER} > .text")).to_have_text("Half")
    page.unroute(CHAT)
    answers(page, {"content": "Hello."})
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(f"{ANSWER} > .text")).to_have_text("Hello.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_model_that_is_gone_gives_way_to_one_that_is_there(page: Page) -> None:
    """As after a restart of the server with other models."""
    gone = json.dumps({"error": {"message": "There is no model 'example'."}})
    page.route(CHAT, lambda route: route.fulfill(status=404, body=gone))
    now = json.dumps({"data": [{"id": "other"}]})
    page.route("**/v1/models", lambda route: route.fulfill(body=now))
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("There is no model")
    expect(page.locator("#model option")).to_have_text(["other"])
    page.unroute(CHAT)
    bodies = answers(page, {"content": "Hello."})
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(f"{ANSWER} > .text")).to_have_text("Hello.")
    assert bodies[0]["model"] == "other"


def test_what_came_of_an_answer_stays_when_the_page_is_left(page: Page) -> None:
    settings(page, Most_new_tokens="4000")
    ask(page, "def f(")
    expect(page.locator(f"{ANSWER} > .text")).not_to_be_empty()
    page.reload()
    expect(page.locator(f"{ANSWER} footer")).to_contain_text("stopped")
    expect(page.locator(f"{ANSWER} > .text")).not_to_be_empty()


def test_leaving_the_page_before_an_answer_is_no_failure(page: Page) -> None:
    page.route(CHAT, lambda _: None)
    ask(page, "Hello?")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.reload()
    expect(page.locator(f"{ANSWER} footer")).to_contain_text("stopped")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("path", ["/", "/host"])
def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    context: BrowserContext, server: Server, path: str
) -> None:
    def check(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer ek-alice":
            route.continue_()
        else:
            body = json.dumps({"error": {"message": "There is no such API key here."}})
            route.fulfill(status=401, body=body)

    page = context.new_page()
    page.route("**/v1/models", check)
    page.route("**/host/state*", check)
    page.goto(path)
    page.get_by_label("This server wants an API key").fill("ek-alice")
    page.keyboard.press("Enter")
    expect(page.get_by_label("This server wants an API key")).to_be_hidden()
    shown = page.locator("#model option" if path == "/" else ".card h3").first
    expect(shown).to_have_text("example")
    assert "ek-alice" not in page.evaluate("JSON.stringify(localStorage)")
    assert "ek-alice" in page.evaluate("JSON.stringify(sessionStorage)")


def test_dark_and_light(context: BrowserContext) -> None:
    page = context.new_page()
    light: dict[str, float] = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.goto("/")
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        light[scheme] = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))
    assert light["light"] > 3 * 200 > 3 * 60 > light["dark"]


def test_motion_is_reduced(page: Page) -> None:
    answers(page, {"content": "Yes."})
    page.emulate_media(reduced_motion="reduce")
    ask(page, "Moves?")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.evaluate("document.getElementById('messages').classList.add('coming')")
    dot = "getComputedStyle(document.querySelector('article.assistant > .text'), '::after')"
    assert page.evaluate(f"{dot}.animationName") == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(f"{dot}.animationName") == "pulse"


def test_all_of_it_by_keyboard(page: Page) -> None:
    answers(page, {"content": "Yes."})
    page.keyboard.type("Is it so?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    names: list[str] = []
    page.locator(".skip").focus()
    for _ in range(20):
        focused = page.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            "return [e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent,"
            "s.outlineStyle, s.outlineWidth]; })()"
        )
        names.append(focused[0].strip())
        if names[-1] == "Send":
            break
        assert focused[1:] == ["solid", "2px"], f"{focused[0]} does not show that it has the focus"
        page.keyboard.press("Tab")
    assert names[0] == "To the message field"
    wanted = ["New conversation", "Is it so?", "Rename Is it so?", "Delete Is it so?",
              "Export as JSON", "Host", "Model", "Settings", "Edit", "Copy", "Regenerate",
              "Your message", "Send"]  # fmt: skip
    assert [name for name in names if name in wanted] == wanted


@pytest.mark.parametrize("path", ["/", "/host"])
def test_all_has_a_name(page: Page, path: str) -> None:
    """What an accessibility checker looks for first."""
    if path == "/":
        answers(page, {"content": MARKDOWN})
        ask(page, "Show me")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    else:
        page.goto(path)
        expect(page.locator("#heat-table tr").first).to_be_visible()
    faults = page.evaluate(
        """() => {
        const faults = [];
        const named = (one) => one.getAttribute('aria-label') || one.labels?.length ||
            one.textContent.trim() || one.title;
        for (const one of document.querySelectorAll('button, a, input, select, textarea, canvas, ' +
            'dialog, [role=group], [tabindex="0"]'))
            if (!named(one)) faults.push('no name: ' + one.outerHTML.slice(0, 80));
        for (const one of document.querySelectorAll('input, select, textarea'))
            if (!one.labels.length) faults.push('no label: ' + one.outerHTML.slice(0, 80));
        for (const one of document.querySelectorAll('img'))
            if (!one.hasAttribute('alt')) faults.push('no alt');
        const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
        if (new Set(ids).size !== ids.length) faults.push('an id occurs twice');
        for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'])
            for (const one of document.querySelectorAll(`[${name}]`))
                if (!ids.includes(one.getAttribute(name))) faults.push('dangling ' + name);
        if (document.querySelectorAll('h1').length !== 1) faults.push('not one h1');
        if (document.querySelectorAll('main').length !== 1) faults.push('not one main');
        if (document.documentElement.lang !== 'en') faults.push('no language');
        if (document.documentElement.scrollWidth > innerWidth) faults.push('wider than the window');
        return faults; }"""
    )
    assert faults == []


def test_a_narrow_window(page: Page) -> None:
    page.set_viewport_size({"width": 380, "height": 700})
    expect(page.get_by_role("button", name="New conversation").first).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New conversation").first).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 340, "height": 700})
    page.goto("/host")
    card = page.locator(".card").bounding_box()
    section = page.locator("#ram").bounding_box()
    assert card is not None
    assert section is not None
    assert card["width"] <= section["width"]


def test_the_host(context: BrowserContext, http: httpx2.Client) -> None:
    page = context.new_page()
    page.goto("/host")
    expect(page.locator(".card h3")).to_have_text("example")
    first = http.get("/host/state?heat=example").json()
    expect(page.locator("#heat-table tr")).to_have_count(len(first["heat"]))
    expect(page.locator("#sessions tr")).to_have_count(1)
    asked = {"prompt": [40], "max_tokens": 20, "ignore_eos": True}
    http.post("/v1/completions", json=asked).raise_for_status()
    tokens = http.get("/host/state").json()["models"][0]["tokens"]
    figure = page.locator(".card .figures > div", has_text="Tokens").locator("dd")
    expect(figure).to_have_text(f"{tokens:,}")
    painted = page.evaluate(
        "(() => { const c = document.getElementById('heat'); return [...c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data].some((one) => one > 0); })()"
    )
    assert painted
    page.locator("#heat").hover(position={"x": 32, "y": 4})
    expect(page.locator("#heat-at")).to_contain_text("expert 0")


def test_the_host_s_engines(context: BrowserContext, http: httpx2.Client) -> None:
    page = context.new_page()
    page.goto("/host")
    lines = page.locator(".card .note p")
    expect(lines).to_have_count(1)
    expect(lines).to_contain_text("Executor program on cpu, process ")
    state = http.get("/host/state").json()
    (engine,) = state["models"][0]["engines"]
    busy = {**engine, "place": "cuda:1", "running": 3, "waiting": 2, "kv_used": 0.5}
    state["models"][0]["engines"] = [{**engine, "pid": None}, busy]
    page.route("**/host/state*", lambda route: route.fulfill(body=json.dumps(state)))
    expect(lines).to_have_count(2)
    expect(lines.first).to_have_text("Engine 0: the next request starts it.")
    expect(lines.last).to_contain_text("on cuda:1")
    expect(lines.last).to_contain_text("3 running, 2 waiting")
    figure = page.locator(".card .figures > div")
    expect(figure.filter(has_text="Running").locator("dd")).to_have_text("3")


def test_the_host_without_its_daemon(context: BrowserContext, http: httpx2.Client) -> None:
    page = context.new_page()
    page.goto("/host")
    expect(page.locator("#sessions tr")).to_have_count(1)
    state = {**http.get("/host/state").json(), "daemon": None, "away": "It has gone."}
    page.route("**/host/state*", lambda route: route.fulfill(body=json.dumps(state)))
    expect(page.get_by_role("alert")).to_contain_text("numbers below are old")
    expect(page.get_by_role("alert")).to_contain_text("It has gone.")
    page.unroute("**/host/state*")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_page_can_reach_no_other_host(browser: Browser, server: Server) -> None:
    """The browser enforces the policy."""
    page = browser.new_page()
    page.goto(f"{server.url}/")
    violated = page.evaluate(
        """() => new Promise((resolve) => {
        document.addEventListener('securitypolicyviolation', (event) => resolve(event.violatedDirective));
        fetch('https://example.invalid/').catch(() => {}); })"""  # noqa: E501
    )
    assert violated == "connect-src"
    page.close()


def test_of_a_long_conversation_the_end_is_shown_and_the_rest_when_it_comes(page: Page) -> None:
    one = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": MARKDOWN}]
    long = {"id": "long", "title": "Long", "model": "", "system": "", "settings": {}}
    page.evaluate(
        "(one) => localStorage.setItem('expertd.conversation.long', JSON.stringify(one))",
        {**long, "messages": one * 60, "updated": 0},
    )
    page.reload()
    page.get_by_role("button", name="Long", exact=True).click()
    expect(page.locator("article .text").last).to_be_in_viewport()
    from_end = "scroll => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight"
    assert page.locator("#scroll").evaluate(from_end) < 2
    laid_out = "article => article.checkVisibility({ contentVisibilityAuto: true })"
    first = page.locator("article h2").first
    assert not first.evaluate(laid_out)
    first.scroll_into_view_if_needed()
    expect(first).to_be_in_viewport()
    assert first.evaluate(laid_out)
