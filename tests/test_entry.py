"""How people come in: invitations, their end, the limit on guesses; and no secret where others read."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from annotate.entry import Throttle, invitation, public_url
from annotate.gate import cookie_name
from annotate.records import DataError
from tests.desk import Desk, Served, chromium
from tests.test_app import Browser, item

FORM = "application/x-www-form-urlencoded"
URL = "https://label.example.org"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("entry"), [item(n) for n in range(20)], url=URL)
    yield served
    served.kill()


def enter(served: Served, secret: str, host: str = "label.example.org") -> tuple[int, Browser]:
    """Through the proxy, unless `host` says otherwise."""
    guest = Browser(served, None)
    status, headers, _ = guest.request("POST", "/enter", f"invitation={secret}", FORM, host=host)
    guest.cookie = headers.get("set-cookie", "").split(";")[0]
    assert status != 303 or {"Secure", "HttpOnly", "SameSite=strict"} <= set(
        headers["set-cookie"].split("; ")
    )
    return status, guest


def named(guest: Browser) -> int:
    return guest.request("GET", "/whoami")[0]


def test_with_an_address_for_others_only_invitations_let_in(served: Served) -> None:
    assert URL in served.said
    nobody = Browser(served, None)
    assert b'name="invitation"' in nobody.request("GET", "/enter")[2]
    for form in ("name=ann", "invitation=", "invitation=guess", "invitation=%00%F0", "name=ann&invitation=x"):
        assert nobody.request("POST", "/enter", form, FORM)[0] == 422
    status, ann = enter(served, served.store.invite("ann"))
    assert status == 303 and ann.request("GET", "/whoami")[2] == b'{"name":"ann"}'


def test_an_invitation_works_again_until_the_next_one_ends_it_and_its_sessions(served: Served) -> None:
    first = served.store.invite("bob")
    guests = [enter(served, first)[1] for _ in range(2)]
    assert [named(guest) for guest in guests] == [200, 200]
    second = served.store.invite("bob")
    assert enter(served, first)[0] == 422
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and 200 in map(named, guests):
        time.sleep(0.2)
    assert [named(guest) for guest in guests] == [401, 401]
    assert enter(served, second)[0] == 303


def test_the_proxys_name_and_origin_are_ours_and_no_others(served: Served) -> None:
    _, ann = enter(served, served.store.invite("cat"))
    host = {"host": "label.example.org"}
    assert ann.request("GET", "/label/config", **host, origin=URL)[0] == 200
    assert b"https://label.example.org/label" in ann.request("GET", "/label/config", **host)[2]
    for origin in ("http://label.example.org", "https://label.example.org.evil.example", "null"):
        assert ann.request("GET", "/label/config", **host, origin=origin)[0] == 403
    for other in ("example.org", "label.example.org:1", "label.example.org.evil.example"):
        assert ann.request("GET", "/label/config", host=other)[0] == 421


def test_guessing_is_throttled_and_those_inside_work_on(tmp_path: Path) -> None:
    served = Served(tmp_path, [item(n) for n in range(3)], url=URL)
    good = served.store.invite("ann")
    _, ann = enter(served, good)
    tried = [enter(served, f"guess{n}")[0] for n in range(30)]
    assert set(tried[:19]) == {422} and set(tried[20:]) == {429}
    assert enter(served, good)[0] == 429  # nobody new for a minute, not even with the right one
    assert named(ann) == 200
    served.kill()


def test_a_throttle_opens_again() -> None:
    throttle = Throttle(limit=2, seconds=0.05)
    for _ in range(2):
        assert not throttle.closed()
        throttle.wrong()
    assert throttle.closed()
    time.sleep(0.06)
    assert not throttle.closed()


def test_addresses_that_would_send_the_cookie_in_the_clear_are_refused() -> None:
    assert public_url("https://Label.Example.org:8443/") == "https://label.example.org:8443"
    assert public_url("http://127.0.0.1:7860") == "http://127.0.0.1:7860"
    for bad in (
        "http://label.example.org",
        "ftp://x",
        "https://x/path",
        "https://x?y",
        "https://a@b",
        "",
        "x",
    ):
        with pytest.raises(DataError, match="https://"):
            public_url(bad)


def test_a_link_enters_in_the_browser_and_its_secret_is_sent_in_no_address(tmp_path: Path) -> None:
    served = Served(tmp_path, [item(n) for n in range(20)])
    link = invitation(served.store, "dora", served.home)
    secret = link.partition("#")[2]
    with chromium() as browser:
        context = browser.new_context()
        desk = Desk(context, served, "someone else")
        desk.page.goto(link)
        desk.ready()
        desk.judge("1")
        desk.sent()
        assert desk.page.inner_text(".name") == "dora" and len(served.labels("dora")) == 1
        assert not [url for url in desk.requests if secret in url.partition("#")[0]]
        assert secret not in desk.page.evaluate(
            "JSON.stringify([history.state, document.referrer, location.href])"
        )
        [session] = [c["value"] for c in context.cookies() if c["name"] == cookie_name(served.store)]
    served.kill()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for hidden in (secret, session):
        assert hidden.encode() not in kept + served.said.encode()  # database, its journal, the server's log
