"""Whatever is sent to the page's server, it answers without falling over; only what the page needs passes."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from annotate.gate import LARGEST, cookie_name
from annotate.keys import FIRST
from annotate.rules import Check, Rules
from annotate.store import Store
from tests.test_app import Browser, Server, item

CALL = "/label/gradio_api/component_server/"
FORM = "application/x-www-form-urlencoded"
ANY = st.characters()  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(ANY), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(f"sqlite:///{tmp_path_factory.mktemp('gate')}/labels.db")
    checks = [
        Check(prompt=i.prompt, completions=i.completions, better=n % 2, feedback="so")
        for n, i in enumerate(map(item, range(50, 60)))
    ]
    Store(server.url).open_round("r", [item(n) for n in range(50)], checks=checks, rules=Rules(repeats=0.5))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ann(server: Server) -> Browser:
    return Browser(server)


def near(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of the right form but for a field or two."""
    right = st.fixed_dictionaries({}, optional=fields)
    return st.builds(
        lambda a, b: a | b, right, st.just({}) | st.dictionaries(st.sampled_from([*fields]), JSON)
    )


LABEL = near(
    token=st.from_regex(r"\d{1,3}-[0-3]-[0-9a-z]{1,20}", fullmatch=True)
    | st.integers(FIRST, FIRST + 2**46 - 1).map("{}-1-a".format),
    preference=st.integers(-4, 4) | st.none(),
    reason=st.text(ANY, max_size=2100) | st.none(),
    client_ms=st.integers(-1, 10**11),
    form=st.sampled_from(["0" * 16, None]) | JSON,
    answers=near(
        ranking=st.lists(st.integers(0, 9), max_size=9) | st.none(),
        rating=st.integers(0, 8) | st.none(),
        attributes=st.dictionaries(st.text(ANY), st.integers(-4, 8), max_size=2),
        flags=st.dictionaries(st.text(ANY), st.lists(st.integers(-1, 9), max_size=2), max_size=2),
        rationale=st.text(ANY, max_size=20) | st.none(),
        edit=near(of=st.integers(-1, 9), text=st.text(ANY, max_size=20)) | st.none(),
    ),
)
STEP = near(labels=st.lists(LABEL | JSON, max_size=5), want=st.integers(-1, 12), count=st.booleans())


@settings(max_examples=150)
@given(STEP | JSON)
@example({"\ud800": 1})
@example({"labels": [], "want": 10**400})
@example({"labels": [{"token": "1-1-\ud800", "preference": 1}], "want": 0})
def test_a_step_of_any_form_is_answered(ann: Browser, argument: object) -> None:
    status, answer = ann.call("step", argument)
    if status == 200:
        assert answer.keys() == {"error"} or (answer["ok"] and len(answer["tasks"]) <= 10)
    else:
        assert status == 400 and re.search("NaN|Infinity", json.dumps(argument))  # which is no JSON


@settings(max_examples=50)
@given(near(keys=st.lists(st.from_regex(r"\d{1,3}-\d{1,3}", fullmatch=True) | JSON, max_size=12)) | JSON)
@example({"keys": ["999999999999999-999999999"]})
@example({"keys": [f"{FIRST}-1", f"{FIRST + 2**46 - 1}-1", f"{FIRST + 2**46}-1"]})
def test_markdown_of_any_form_is_answered(ann: Browser, argument: object) -> None:
    status, answer = ann.call("markdown", argument)
    assert status == 400 or answer.keys() in ({"error"}, {"ok", "html"})


@settings(max_examples=50)
@given(JSON)
def test_hello_depends_on_nothing_but_the_person(ann: Browser, argument: object) -> None:
    status, answer = ann.call("hello", argument)
    assert status == 200 and answer["name"] == "ann"


BODY = {"data": {}, "component_id": 1, "fn_name": "step", "session_hash": "x"}


@settings(max_examples=150)
@given(
    st.binary(max_size=300)
    | st.builds(lambda a, b: json.dumps(BODY | {a: b}).encode(), st.sampled_from([*BODY]), JSON)
)
@example(b"[" * 200_000)
@example(b'{"data":' * 20_000)
@example(
    b'{"data": ' + b"[" * 5000 + b"]" * 5000 + b', "component_id": 1, "fn_name": "step", "session_hash": "x"}'
)
@example(b"9" * 10_000)
@example(json.dumps(BODY | {"session_hash": "x" * 65}).encode())
def test_a_call_of_any_form_is_answered(ann: Browser, body: bytes) -> None:
    status, _, _ = ann.request(
        "POST", CALL, body.replace(b'"component_id": 1,', b'"component_id": %d,' % ann.component)
    )
    assert status in (200, 400)


PATHS = [
    *("/", "/enter", "/whoami", "/label/", "/label/config", "/label/assets/", "/label/static/", CALL),
    *(
        "/label/theme.css",
        "/label/gradio_api/startup-events",
        "/label/gradio_api/theme.css",
        "/label/gradio_api/",
        "/round",
        "/round/annotator/",
    ),
]


@settings(max_examples=150)
@given(
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"]),
    st.sampled_from(PATHS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    | st.sampled_from(["..%2f..%2fetc/passwd", "%00", "a\0"]),
    st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=30),
)
@example("GET", "/label/assets/", "%00", "")
@example("GET", "/label/static/", "\0.js", "")
def test_no_request_makes_the_server_fall_over(
    ann: Browser, method: str, path: str, more: str, header: str
) -> None:
    extra = {"origin": header, "sec_fetch_site": header} if len(header) % 3 == 1 else {"accept": header}
    status, _, _ = ann.request(
        method, path + quote(more), **{k: v.encode("latin-1") for k, v in extra.items()}
    )
    assert status < 500


@settings(max_examples=100)
@given(
    st.binary(max_size=100) | st.builds(lambda name: urlencode({"name": name}).encode(), st.text(max_size=70))
)
@example(b"name=%ED%A0%80")
@example(b"name=a&name=b")
@example(b"name[]=a")
def test_any_form_at_the_entry_is_answered(server: Server, body: bytes) -> None:
    nobody = Browser(server, None)
    assert nobody.request("POST", "/enter", body, FORM)[0] in (303, 422)
    assert nobody.request("POST", "/enter", body, "multipart/form-data; boundary=x")[0] in (303, 400, 422)


@settings(max_examples=50)
@given(st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=60))
def test_no_cookie_but_the_right_one_lets_in(server: Server, value: str) -> None:
    nobody = Browser(server, None)
    for cookie in (
        value,
        f"{cookie_name(Store(server.url))}={value}",
        f'{cookie_name(Store(server.url))}="{value}"',
    ):
        assert nobody.request("GET", "/whoami", cookie=cookie.encode("latin-1"))[0] == 401


def test_another_persons_session_hash_gives_nothing(server: Server) -> None:
    ann, bob = Browser(server, "hash owner"), Browser(server, "hash thief")
    [mine] = ann.step(want=1)["tasks"]  # all of these tests send the session hash "x"
    assert bob.call("hello", {})[1]["name"] == "hash thief"
    assert mine not in bob.step(want=10)["tasks"]


def test_forwarded_headers_change_nothing(ann: Browser) -> None:
    for name in ("x_forwarded_host", "x_gradio_server", "x_forwarded_proto", "forwarded"):
        status, _, body = ann.request("GET", "/label/config", **{name: "http://evil.example"})
        assert status == 200 and b"evil" not in body


def test_gradio_keeps_no_history_sends_no_analytics_and_has_no_api(ann: Browser) -> None:
    config = json.loads(ann.request("GET", "/label/config")[2])
    assert config.get("analytics_enabled") is False and not config.get("run_history")
    assert config["dependencies"] == [] and not config.get("mcp_server")
    assert [c["type"] for c in config["components"]] == ["html"]


def test_a_call_as_deep_as_it_can_be_read_is_answered(ann: Browser) -> None:
    config = json.loads(ann.request("GET", "/label/config")[2])
    call = {"component_id": config["components"][0]["id"], "fn_name": "step", "session_hash": "x", "data": 0}
    for depth in range(800, 1000, 4):
        body = json.dumps(call).replace('"data": 0', '"data": ' + "[" * depth + "]" * depth)
        assert ann.request("POST", CALL, body.encode())[0] in (200, 400), depth


def test_a_body_that_lies_about_its_length_is_cut(ann: Browser) -> None:
    assert ann.request("POST", CALL, b"x" * (LARGEST + 1))[0] == 413
    assert ann.request("POST", "/enter", b"x", FORM, content_length="\xb2")[0] in (400, 411)
