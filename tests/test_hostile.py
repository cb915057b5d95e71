"""Outputs written against their readers, and other sites against our server, in the real browser."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext
from pydantic import ValidationError

from annotate.records import Item, Message, prompt_id
from annotate.rules import Check, Qualify, Rules
from tests.desk import Desk, Served, chromium
from tests.hostile import AWAY, OUTPUTS

ACTIVE = ":is(a, img, script, style, form, iframe, svg, input, button, video, object, dialog, [style], [id])"


def items() -> Iterator[Item]:
    """Each output once as prompt, once as either reply."""
    texts = list(OUTPUTS.values())
    for number, name in enumerate(texts):
        prompt = [Message(role="user", content=name), Message(role="assistant", content=f"{number} {name}")]
        replies = [texts[number - 1], texts[number - 2]]
        if number % 2 == 0:
            row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
            yield Item(**row, completions=replies)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("hostile"), items())
    yield served
    served.kill()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    yield context
    context.close()


@pytest.mark.parametrize("format", ["raw", "markdown"])
def test_hostile_outputs_are_shown_exactly_run_nothing_load_nothing_and_cover_nothing(
    context: BrowserContext, served: Served, format: str
) -> None:
    assert len(OUTPUTS) >= 100
    desk = Desk(context, served, f"reader of {format}")
    seen = set()
    expected = {}
    for number in range(len(served.items)):
        task = desk.task
        shown = desk.shown()
        if format == "markdown":
            desk.page.keyboard.press("x")
            desk.page.keyboard.press("m")
            desk.page.wait_for_selector(".replies .rich", state="attached", timeout=5000)
            assert desk.page.query_selector_all(f".text {ACTIVE}") == []
            desk.page.keyboard.press("m")
        asked = desk.page.eval_on_selector_all(".message .text", "all => all.map(box => box.textContent)")
        assert asked == [message.content for message in served.items[task].prompt]
        seen.update(shown, asked)
        button = desk.page.locator(f".scale button:nth-child({number % 7 + 1})")
        desk.page.wait_for_timeout(160)
        button.click(timeout=5000)  # playwright clicks only what nothing covers
        sign = 1 if shown[0] == served.items[task].completions[0] else -1
        expected[task] = sign * (3 - number % 7)
    desk.sent()
    assert set(OUTPUTS.values()) <= seen
    found = served.labels(f"reader of {format}")
    assert {task: label.preference for task, label in found.items()} == expected
    assert desk.page.evaluate("window.hacked") is None
    assert [url for url in desk.requests if not url.startswith((served.home, "data:"))] == []
    assert desk.faults == [] and desk.page.url == f"{served.home}/label/"


def test_feedback_to_checks_is_shown_exactly_and_runs_nothing(
    context: BrowserContext, tmp_path: Path
) -> None:
    texts = list(OUTPUTS.values())[::12]
    checks = [
        Check(prompt=i.prompt, completions=i.completions, better=0, feedback=text)
        for i, text in zip(items(), texts, strict=False)
    ]
    rules = Rules(qualify=Qualify(checks=len(checks), right=0.01))
    served = Served(tmp_path, items(), extras={"checks": checks, "rules": rules})
    desk = Desk(context, served, "ann")
    for check in checks:
        desk.press("1")
        desk.page.wait_for_selector(".checked", state="visible")
        assert desk.page.text_content(".checked .because") == check.feedback
        assert desk.page.query_selector_all(f".checked p {ACTIVE}") == []
        desk.page.click(".checked button", timeout=5000)  # playwright clicks only what nothing covers
        desk.page.wait_for_selector(".checked", state="hidden")
    assert desk.page.evaluate("window.hacked") is None and desk.faults == []
    assert [url for url in desk.requests if not url.startswith((served.home, "data:"))] == []
    served.kill()


def test_a_text_that_is_not_unicode_never_becomes_an_item() -> None:
    message = Message(role="user", content="x")
    row = {"id": "0", "split": "train", "use": "preference", "prompt": [message]}
    for bad in ("\ud800", "a\udfffb", "\udc00\ud800"):
        with pytest.raises(ValidationError, match="unicode"):
            Item(**row, completions=[bad, "x"])
        with pytest.raises(ValidationError, match="unicode"):
            Message(role="user", content=bad)


ATTACKS = {
    "fetch with cookies": "fetch(`${at}/label/config`, {credentials: 'include'}).then(r => r.text())",
    "fetch without CORS": "fetch(`${at}/label/`, {mode: 'no-cors', credentials: 'include'})"
    ".then(r => {if (r.type === 'opaque') throw 0})",
    "a call as JSON": "fetch(call, {method: 'POST', credentials: 'include', body,"
    " headers: {'content-type': 'application/json'}}).then(r => r.json())",
    "a call as text": "fetch(call, {method: 'POST', credentials: 'include', mode: 'no-cors', body})"
    ".then(() => {throw 0})",
    "a script": "load('script', {src: `${at}/label/config`})",
    "an image": "load('img', {src: `${at}/favicon.ico`})",
    "a style": "load('link', {rel: 'stylesheet', href: `${at}/label/theme.css`})",
}


class OtherSite(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>other</title><body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The same host, another port."""
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherSite)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{site.server_port}/"
    site.shutdown()


def test_a_page_of_another_origin_reads_nothing_and_writes_nothing(
    context: BrowserContext, served: Served, elsewhere: str
) -> None:
    desk = Desk(context, served, "victim")
    key = desk.page.get_attribute(".stage", "data-task")
    component = desk.page.evaluate("window.gradio_config.components.find(c => c.type === 'html').id")
    page = context.new_page()
    page.goto(elsewhere)
    setting = {"at": served.home, "key": key, "component": component}
    for name, attack in ATTACKS.items():
        got = page.evaluate(
            f"""({{at, key, component}}) => {{
              const call = `${{at}}/label/gradio_api/component_server/`;
              const labels = [{{token: `${{key}}-evil`, preference: 3}}];
              const data = {{labels, want: 0}};
              const to = {{component_id: component, fn_name: 'step', session_hash: 'x'}};
              const body = JSON.stringify({{data, ...to}});
              const load = (tag, values) => new Promise((good, bad) => {{
                const element = Object.assign(document.createElement(tag), values);
                element.onload = good; element.onerror = bad; document.head.append(element);
              }});
              return {attack}.then(() => 'reached', () => 'refused');
            }}""",
            setting,
        )
        assert got == "refused", name

    for path in ("/label/", "/enter"):
        page.evaluate("at => document.body.innerHTML = `<iframe src='${at}'></iframe>`", served.home + path)
        page.wait_for_timeout(300)
        assert not [
            f for f in page.frames if f.url.startswith(served.home) and f.query_selector("main, form")
        ]
    form = f"<form method=post action='{served.home}/enter'><input name=name value=evil></form>"
    page.evaluate("form => { document.body.innerHTML = form; document.forms[0].submit(); }", form)
    page.wait_for_url(f"{served.home}/enter")
    assert "not from another site" in page.content()
    assert served.labels("victim") == {} and served.labels("evil") == {}
    desk.judge("1")  # and the victim works on undisturbed
    desk.sent()
    assert len(served.labels("victim")) == 1


def test_the_page_asks_for_nothing_that_its_policy_forbids(context: BrowserContext, served: Served) -> None:
    said: list[str] = []
    context.on("console", lambda message: said.append(message.text))
    desk = Desk(context, served, "quiet")
    desk.judge("2")
    desk.sent()
    assert [line for line in said if "Content Security" in line or AWAY in line] == []
