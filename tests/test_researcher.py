"""Who may see the researcher's pages, over HTTP; and in the browser that hostile texts stay texts there."""

import re
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import BrowserContext

from annotate.app import application
from annotate.ledger import Ledger
from annotate.overview import overview
from annotate.quality import state
from annotate.queue import Shown
from annotate.researcher import tally, with_quality
from annotate.rules import Check, Qualify, Rules
from annotate.store import Store
from stages import cli
from tests.crowd import judge
from tests.desk import Desk, Served, chromium
from tests.hostile import OUTPUTS
from tests.test_accessibility import faults
from tests.test_app import POLICY, Browser, Server, item
from tests.test_collect import EXPERIMENT
from tests.test_entry import FORM, URL, enter
from tests.test_hostile import items as hostile_items

PAGES = ["/round", "/round/disagreements", "/round/annotator/1", "/round/round.css", "/round/round.js"]
HOST = {"host": "label.example.org"}
NASTY = '<img src=x onerror="window.hacked=1">{{7*7}}'
SKIP = "</q><script>window.hacked=1</script>"


def said(shown: Shown) -> dict[str, Any]:
    """A skip with a hostile reason, or a verdict."""
    number = int(re.sub(r"\D", "", shown.key.split("-")[0]))
    return (
        {"preference": number % 5 - 2, "client_ms": 900}
        if number % 3
        else {"preference": None, "reason": SKIP}
    )


def work(store: Store, round_id: int, labels: int) -> None:
    for name in (NASTY, "bob"):
        judge(store, round_id, name, time.time() - 100, said, labels)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("public"), [item(n) for n in range(20)], url=URL)
    work(served.store, served.round, 20)
    yield served
    served.kill()


@pytest.fixture(scope="module")
def rita(served: Served) -> Browser:
    return enter(served, served.store.invite("rita", "researcher"))[1]


def test_researchers_enter_to_the_round_and_may_label_too(served: Served, rita: Browser) -> None:
    assert f"{URL}/round" in served.process.stdout.readline()  # type: ignore[union-attr]
    status, headers, _ = Browser(served, None).request(  # type: ignore[arg-type]
        "POST", "/enter", f"invitation={served.store.invite('ruth', 'researcher')}", FORM, **HOST
    )
    assert (status, headers["location"]) == (303, "/round")
    for path in (*PAGES, "/label/"):
        assert rita.request("GET", path, **HOST)[0] == 200


def test_annotators_are_refused_in_one_line_and_nobody_else_is_told_anything(served: Served) -> None:
    _, ann = enter(served, served.store.invite("ann"))
    nobody = Browser(served, None)  # type: ignore[arg-type]
    for path in PAGES:
        status, _, body = ann.request("GET", path, **HOST)
        assert (status, body) == (403, b"this page is for researchers: ask for an invitation as one")
        status, headers, body = nobody.request("GET", path, **HOST)
        assert (status, headers["location"], body) == (303, "/enter", b"")


def test_a_new_invitation_says_the_role_anew(served: Served) -> None:
    _, before = enter(served, served.store.invite("sam", "researcher"))
    assert before.request("GET", "/round", **HOST)[0] == 200
    _, after = enter(served, served.store.invite("sam"))
    assert after.request("GET", "/round", **HOST)[0] == 403
    deadline = time.monotonic() + 10
    while before.request("GET", "/round", **HOST)[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert before.request("GET", "/round", **HOST)[0] == 303  # the session of the first has ended


def test_other_sites_other_methods_and_other_pages_are_refused(rita: Browser) -> None:
    for path in PAGES:
        assert rita.request("GET", path, **HOST, origin="https://evil.example")[0] == 403
        assert rita.request("GET", path, **HOST, sec_fetch_site="cross-site", sec_fetch_mode="cors")[0] == 403
        assert rita.request("POST", path, "", FORM, **HOST)[0] == 404
        assert rita.request("GET", path, host="evil.example")[0] == 421
        _, headers, _ = rita.request("GET", path, **HOST)
        policy = headers["content-security-policy"]
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "script-src 'self'" in policy
    for path in ("/round/", "/round/x", "/round/annotator/", "/round/annotator/-1", "/round/annotator/%31"):
        assert rita.request("GET", path, **HOST)[0] in (404, 200 if path.endswith("%31") else 404)
    for number in (0, 999, 10**15 - 1):
        status, _, body = rita.request("GET", f"/round/annotator/{number}", **HOST)
        assert (status, body) == (404, b"nobody of that number has labelled in this round")


def test_a_researcher_pauses_and_resumes_the_round_and_nobody_else_does(
    served: Served, rita: Browser
) -> None:
    _, ann = enter(served, served.store.invite("ann"))
    assert ann.request("POST", "/round/state", "state=paused", FORM, **HOST)[0] == 403
    assert (
        rita.request("POST", "/round/state", "state=paused", FORM, **HOST, origin="https://evil.example")[0]
        == 403
    )
    status, _, body = rita.request("POST", "/round/state", "state=gone", FORM, **HOST)
    assert (status, body) == (422, b"state: open, paused, closed")
    assert state(served.store, served.round) == "open"
    for wanted, button in (("paused", b">Resume<"), ("closed", b">Open again<"), ("open", b">Pause<")):
        status, headers, _ = rita.request("POST", "/round/state", f"state={wanted}", FORM, **HOST)
        assert (status, headers["location"]) == (303, "/round")
        assert state(served.store, served.round) == wanted
        assert button in rita.request("GET", "/round", **HOST)[2]


def test_checks_and_repeats_stand_beside_each_annotator(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    texts = item(99).model_dump(include={"prompt", "completions"})
    checks = [Check.model_validate(texts | {"better": 0})]
    tasks = [item(n) for n in range(60)]
    round_id = store.open_round("r", tasks, checks=checks, rules=Rules(repeats=0.2))
    judge(store, round_id, "ann", time.time() - 100, lambda _: {"preference": 2, "client_ms": 900}, 60)
    ledger = Ledger(store, round_id)
    [ann] = with_quality(ledger, overview(ledger)).people
    assert ann.checks in ((0.0, 1), (1.0, 1))
    assert ann.repeats is not None and ann.repeats[1] >= 5
    assert ann.repeats[0] == 0  # who always takes the first is never of one mind on both orders
    assert tally(ann.repeats) == f"0% of {ann.repeats[1]}"
    assert tally(None) == ""


def test_who_answered_only_checks_is_there_too(fresh: Callable[[], str]) -> None:
    store, texts = Store(fresh()), item(99).model_dump(include={"prompt", "completions"})
    checks, rules = [Check.model_validate(texts | {"better": 0})], Rules(qualify=Qualify(checks=1, right=1))
    round_id = store.open_round("r", [item(0)], checks=checks, rules=rules)
    judge(store, round_id, "ann", time.time() - 100, lambda _: {"preference": 0})
    ledger = Ledger(store, round_id)
    [ann] = with_quality(ledger, overview(ledger)).people
    assert (ann.name, ann.labels, ann.checks) == ("ann", 0, (0.0, 1)) and time.time() - ann.last > 99
    browser = TestClient(application(store, round_id, "r"), "http://127.0.0.1")
    assert "0% of 1" in browser.get("/round").text
    alone = browser.get(f"/round/annotator/{ann.id}")
    assert alone.status_code == 200 and "0% of 1" in alone.text and "No labels in this round" in alone.text
    store.close()


def test_no_page_names_a_policy_and_hostile_names_and_reasons_are_text(rita: Browser) -> None:
    for path in PAGES[:3]:
        body = rita.request("GET", path, **HOST)[2].decode()
        assert POLICY not in body
        assert NASTY not in body and NASTY in unescape(body) and "<script>window" not in body
    assert SKIP in unescape(rita.request("GET", "/round", **HOST)[2].decode())


def test_on_ones_own_machine_whoever_is_there_is_the_researcher(tmp_path: Path) -> None:
    server = Server(f"sqlite:///{tmp_path}/labels.db")
    store = Store(server.url)
    round_id = store.open_round("r", [item(n) for n in range(9)], overlap=2)
    server.start()
    assert f"See how it goes at http://127.0.0.1:{server.port}/round\n" == server.process.stdout.readline()  # type: ignore[union-attr]
    nobody = Browser(server, None)
    assert b"Nothing has been labelled yet" in nobody.request("GET", "/round")[2]
    assert b"No two people" in nobody.request("GET", "/round/disagreements")[2]
    work(store, round_id, 3)
    deadline = time.monotonic() + 30  # a reading serves for a while
    while b"<table>" not in nobody.request("GET", "/round")[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    for who in (nobody, Browser(server, "ann")):
        for path in PAGES:
            assert who.request("GET", path)[0] == 200
        assert who.request("GET", "/round", host="evil.example")[0] == 421
    assert Browser(server, "ann").call("hello", {})[1]["researcher"]
    body = nobody.request("GET", "/round")[2].decode()
    assert "6 of 18 labels" in re.sub(r"\s+", " ", body)
    server.kill()


def test_the_command_line_invites_researchers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path))
    config = tmp_path / "test.yaml"
    config.write_text(EXPERIMENT)
    for options, role in ((["--researcher"], "researcher"), ([], "annotator")):
        assert cli.main(["annotate", str(config), "--invite", "rita", *options]) == 0
        me = Store().invited(capsys.readouterr().out.strip().partition("#")[2])
        assert me is not None
        who = Store().session(Store().start_session(me))
        assert who is not None and (who.name, who.role) == ("rita", role)
    assert "goes with --invite" in fails("annotate", config, "--researcher", code=2)


# ---- in the browser


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("hostile"), hostile_items(), overlap=2)
    work(served.store, served.round, 50)
    yield served
    served.kill()


@pytest.fixture(scope="module")
def contexts() -> Iterator[Callable[..., BrowserContext]]:
    with chromium() as browser:
        yield lambda **options: browser.new_context(viewport={"width": 1200, "height": 800}, **options)


def test_hostile_texts_are_shown_as_they_are_run_nothing_and_load_nothing(
    contexts: Callable[..., BrowserContext], desk: Served
) -> None:
    page = contexts().new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    wanted = {
        text
        for past in desk.store.history(desk.round, desk.store.annotator("bob"), 50)
        for text in (*past.shown.completions, *(m["content"] for m in past.shown.messages))
        if 0 < len(text) < 4000 and "\0" not in text
    }
    assert len(wanted & set(OUTPUTS.values())) > 80
    seen: set[str] = set()
    for path in ("/round", "/round/disagreements", f"/round/annotator/{desk.store.annotator('bob')}"):
        page.goto(desk.home + path)
        seen |= set(page.eval_on_selector_all(".text", "all => all.map(box => box.textContent)"))
        assert page.evaluate("window.hacked") is None
        assert page.query_selector_all(".text *, .opinions img, .opinions script, main [style]") == []
        assert page.title().startswith("prefloop: ")
    as_parsed = {text.replace("\r\n", "\n").replace("\r", "\n") for text in wanted}  # as HTML reads them
    assert as_parsed <= seen
    assert [url for url in asked if not url.startswith(desk.home)] == []
    page.context.close()


def test_the_page_renews_itself_where_the_reader_is(
    contexts: Callable[..., BrowserContext], tmp_path: Path
) -> None:
    served = Served(tmp_path, [item(n) for n in range(40)], overlap=3)
    work(served.store, served.round, 20)
    page = contexts().new_page()
    page.goto(f"{served.home}/round")
    page.click("summary")
    assert page.query_selector_all("#live :is(a, button, summary, [tabindex]):not([id])") == []
    page.focus("text=Pause")
    page.evaluate("scrollTo(0, 350)")
    place = page.evaluate("scrollY")
    judge(served.store, served.round, "cat", time.time(), said, 5)
    deadline = time.monotonic() + 60  # a reading serves for a while, the longer the more it cost
    while "45 of" not in page.inner_text("#progress") and time.monotonic() < deadline:
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(300)
    assert "45 of" in page.inner_text("#progress")
    assert place > 100 and page.evaluate("scrollY") == place
    assert page.evaluate("document.activeElement.textContent") == "Pause"
    assert page.query_selector("#columns[open]")
    served.kill()
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#fresh:has-text('no answer')", timeout=5000)
    page.context.close()


def test_closing_the_round_is_asked_about_first(
    contexts: Callable[..., BrowserContext], tmp_path: Path
) -> None:
    served = Served(tmp_path, [item(0)])
    page = contexts().new_page()
    page.goto(f"{served.home}/round")
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.click("text=Close")
    page.reload()
    assert state(served.store, served.round) == "open" and asked[0].startswith("Close the round?")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("text=Close")
    page.wait_for_selector("text=Open again")
    assert state(served.store, served.round) == "closed"
    page.context.close()
    served.kill()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_researchers_page_has_a_serious_fault_or_is_wider_than_the_screen(
    contexts: Callable[..., BrowserContext], desk: Served, width: int, scheme: str
) -> None:
    page = contexts(color_scheme=scheme, bypass_csp=True).new_page()  # axe is put into the page
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/round", "/round/disagreements", "/round/annotator/2"):
        page.goto(desk.home + path)
        if path == "/round":
            page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert faults(page) == []
    page.context.close()


def test_the_help_of_the_labelling_page_leads_researchers_there(
    contexts: Callable[..., BrowserContext], desk: Served
) -> None:
    at = Desk(contexts(), desk, "curious")
    at.press("?")
    at.page.click("text=See how the round goes")
    at.page.wait_for_url("**/round")
    at.page.context.close()
