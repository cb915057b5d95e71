"""What may reach the labelling page, and how answers are sealed. Everything not named here is refused.

Gradio serves more than the page needs (uploads, a file proxy, its API, other people's session state), all
of it open to whoever may see the page. This gate stands before it and lets through a list.
"""

import json
import re
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from annotate.store import Store

HOSTS = ("127.0.0.1", "localhost")
"""A page of another site cannot reach us under another name (DNS rebinding)."""
OWN = {("GET", "/"), ("GET", "/enter"), ("POST", "/enter"), ("GET", "/whoami"), ("GET", "/favicon.ico")}
ASSETS = re.compile(r"/label/((assets|static)(/[\w-][\w.-]*)+|theme\.css)", re.ASCII)
PAGE = {"/label/", "/label/config", "/label/gradio_api/startup-events", "/label/gradio_api/theme.css"}
CALL = "/label/gradio_api/component_server"
LARGEST = 256 * 1024
"""Bytes of a request: twenty labels with long reasons are a fifth of it."""
LONGEST_HASH = 64
"""Characters of a session hash, of which Gradio keeps the last ten thousand; the page's has eleven."""
FORWARDED = (b"forwarded", b"x-forwarded-", b"x-gradio-")
"""Headers by which Gradio would let a request say where the page lives."""
HEADERS = {
    # Gradio's own page needs inline scripts and eval; nothing may be loaded from or sent to another host.
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",  # with no-referrer, browsers say "Origin: null" of our own form
    "x-content-type-options": "nosniff",
}


Who = tuple[int, str]
"""Id and name of an annotator."""


class Gate:
    """ASGI middleware; what it lets through finds the annotator in its scope under "annotator"."""

    def __init__(self, app: ASGIApp, store: Store, component: int, functions: set[str]):
        """`component` is the id of the page's stage, `functions` the server functions it may call."""
        self.app = app
        self.store = store
        self.component = component
        self.functions = functions
        self._known: dict[str, Who] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].startswith(FORWARDED)]}
        headers = Headers(scope=scope)
        scope["annotator"] = self._who(headers)
        answer: ASGIApp = _refusal(scope, headers) or self.app
        if answer is self.app and scope["path"] in (CALL, CALL + "/"):
            body = await _read(receive)
            receive = _replay(body)
            if not self._is_call(body):
                answer = PlainTextResponse("not a call of this page", 400)
        await answer(scope, receive, _sealed(send))

    def _who(self, headers: Headers) -> Who | None:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(cookie_name(self.store))
        except CookieError:
            return None
        if morsel is None:
            return None
        found = self._known.get(morsel.value) or self.store.session(morsel.value)
        if found:
            self._known[morsel.value] = found
        return found

    def _is_call(self, body: bytes) -> bool:
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return False
        return (
            isinstance(call, dict)
            and call.keys() == {"data", "component_id", "fn_name", "session_hash"}
            and call["component_id"] == self.component
            and isinstance(call["fn_name"], str)
            and call["fn_name"] in self.functions
            and isinstance(call["session_hash"], str)
            and len(call["session_hash"]) <= LONGEST_HASH
        )


def cookie_name(store: Store) -> str:
    """Browsers share cookies between ports, so each database has its own."""
    return f"prefloop-{store.id[:8]}"


def _refusal(scope: Scope, headers: Headers) -> Response | None:
    method, path = scope["method"], scope["path"]
    host = headers.get("host", "")
    if host.rsplit(":", 1)[0] not in HOSTS:
        return PlainTextResponse("this page answers on 127.0.0.1 only", 421)
    if headers.get("origin", f"http://{host}") != f"http://{host}" or _embedded(headers):
        return PlainTextResponse("not from another site", 403)
    length = headers.get("content-length", "" if method == "POST" else "0")
    if not re.fullmatch(r"[0-9]{1,12}", length):
        return PlainTextResponse("length required", 411)
    if int(length) > LARGEST:
        return PlainTextResponse("too large", 413)
    if (method, path) in OWN:
        return None
    asset = method == "GET" and ASSETS.fullmatch(path) is not None
    page = asset or (method == "GET" and path in PAGE)
    call = method == "POST" and path in (CALL, CALL + "/")
    if not page and not call:
        return PlainTextResponse("no such page", 404)
    if call and not headers.get("content-type", "").startswith("application/json"):
        return PlainTextResponse("JSON only", 415)
    if scope["annotator"] is None and not asset:
        return (
            RedirectResponse("/enter", 303)
            if path == "/label/"
            else PlainTextResponse("say who you are", 401)
        )
    return None


def _embedded(headers: Headers) -> bool:
    """Whether a page of another site asks, as with an image, a script or fetch. A link there is no harm."""
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
    return site not in ("same-origin", "none") and mode != "navigate"


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more and len(body) <= LARGEST:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _sealed(send: Send) -> Send:
    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sealed
