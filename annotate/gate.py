"""What may reach the labelling page, and how answers are sealed. Everything not named here is refused.

Gradio serves more than the page needs (uploads, a file proxy, its API, other people's session state), all
of it open to whoever may see the page. This gate stands before it and lets through a list.
"""

import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from annotate.records import DataError
from annotate.store import Store, Who

HOSTS = ("127.0.0.1", "localhost")
"""Under another name no page of another site can reach us (DNS rebinding)."""
OWN = {("GET", "/"), ("GET", "/enter"), ("POST", "/enter"), ("GET", "/whoami"), ("GET", "/favicon.ico")}
ASSETS = re.compile(r"/label/((assets|static)(/[\w-][\w.-]*)+|theme\.css)", re.ASCII)
RESEARCH = re.compile(r"/round(/round\.css|/round\.js|/disagreements|/annotator/[0-9]{1,15})?", re.ASCII)
CHANGE = ("POST", "/round/state")
PAGE = {"/label/", "/label/config", "/label/gradio_api/startup-events", "/label/gradio_api/theme.css"}
CALL = "/label/gradio_api/component_server"
LARGEST = 256 * 1024
"""Bytes of a request: twenty labels with long reasons are a fifth of it."""
LONGEST_HASH = 64
"""Characters of a session hash, of which Gradio keeps the last ten thousand; the page's has eleven."""
REMEMBERED = 2.0
"""Seconds until a session is looked up again, and so until one that ended is shut out."""
FORWARDED = (b"forwarded", b"x-forwarded-", b"x-gradio-")
"""Headers by which Gradio would let a request say where the page lives."""
UNREACHABLE = "the label database does not answer"
"""To a browser; what the database said is for those who run the server."""
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
STRICT = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""For the pages of researchers, which are ours alone."""


class Gate:
    """ASGI middleware; what it lets through finds in its scope who asks, "annotator", and what, "call"."""

    def __init__(
        self, app: ASGIApp, store: Store, component: int, functions: set[str], url: str | None = None
    ):
        """`component` is the id of the page's stage, `functions` the server functions it may call.

        `url`: the address of a proxy before us, if any, as `annotate.entry.public_url` returns it.
        """
        self.app = app
        self.store = store
        self.component = component
        self.functions = functions
        self.url = url
        self._known: dict[str, tuple[Who, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].startswith(FORWARDED)]}
        headers = Headers(scope=scope)
        try:
            scope["annotator"] = self._who(headers)
        except DataError:
            return await PlainTextResponse(UNREACHABLE, 503)(scope, receive, send)
        origin = self._origin(headers.get("host", ""))
        scope["scheme"] = (origin or "http").partition(":")[0]
        answer: ASGIApp = _foreign(headers, origin) or _refusal(scope, headers, self.url is None) or self.app
        if answer is self.app and scope["path"] in (CALL, CALL + "/"):
            scope["call"] = self._call(await _read(receive))
            if scope["call"] is None:
                answer = PlainTextResponse("not a call of this page", 400)
        research = RESEARCH.fullmatch(scope["path"]) is not None
        await answer(scope, receive, _sealed(send, HEADERS | (STRICT if research else {})))

    def _who(self, headers: Headers) -> Who | None:
        secret = cookie_parser(headers.get("cookie", "")).get(cookie_name(self.store))
        if secret is None:
            return None
        found, until = self._known.get(secret, (None, 0.0))
        if time.monotonic() >= until:
            found = self.store.session(secret)
            self._known.pop(secret, None)
            if found and self.url is None:  # whoever is at this machine
                found = found._replace(role="researcher")
            if found:
                self._known[secret] = found, time.monotonic() + REMEMBERED
        return found

    def _origin(self, host: str) -> str | None:
        """Where the browser believes to be; None where that is neither this machine nor our proxy."""
        if host.rsplit(":", 1)[0] in HOSTS:
            return f"http://{host}"
        return self.url if self.url and host == urlsplit(self.url).netloc else None

    def _call(self, body: bytes) -> dict[str, Any] | None:
        """The call, parsed here alone, so that nothing behind the gate can fail to read it; None: no call."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return None
        fits = (
            isinstance(call, dict)
            and call.keys() == {"data", "component_id", "fn_name", "session_hash"}
            and call["component_id"] == self.component
            and isinstance(call["fn_name"], str)
            and call["fn_name"] in self.functions
            and isinstance(call["session_hash"], str)
            and len(call["session_hash"]) <= LONGEST_HASH
        )
        return call if fits else None


def cookie_name(store: Store) -> str:
    """Browsers share cookies between ports, so each database has its own."""
    return f"prefloop-{store.id[:8]}"


def _foreign(headers: Headers, origin: str | None) -> Response | None:
    """A link on another site may lead here; a form, script, image or fetch there may not."""
    if origin is None:
        return PlainTextResponse("this page does not answer under that name", 421)
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
    embedded = site not in ("same-origin", "none") and mode != "navigate"
    if embedded or headers.get("origin", origin) != origin:
        return PlainTextResponse("not from another site", 403)
    return None


def _refusal(scope: Scope, headers: Headers, alone: bool) -> Response | None:
    """`alone`: only this machine can reach us, and whoever is at it is the researcher."""
    method, path, who = scope["method"], scope["path"], scope["annotator"]
    length = headers.get("content-length", "" if method == "POST" else "0")
    if not re.fullmatch(r"[0-9]{1,12}", length):
        return PlainTextResponse("length required", 411)
    if int(length) > LARGEST:
        return PlainTextResponse("too large", 413)
    if (method, path) in OWN:
        return None
    if (method == "GET" and RESEARCH.fullmatch(path)) or (method, path) == CHANGE:
        return _research(who, alone)
    asset = method == "GET" and ASSETS.fullmatch(path) is not None
    page = asset or (method == "GET" and path in PAGE)
    call = method == "POST" and path in (CALL, CALL + "/")
    if not page and not call:
        return PlainTextResponse("no such page", 404)
    if call and not headers.get("content-type", "").startswith("application/json"):
        return PlainTextResponse("JSON only", 415)
    if who is None and not asset:
        return (
            RedirectResponse("/enter", 303)
            if path == "/label/"
            else PlainTextResponse("say who you are", 401)
        )
    return None


def _research(who: Who | None, alone: bool) -> Response | None:
    if alone or (who is not None and who.role == "researcher"):
        return None
    if who is None:
        return RedirectResponse("/enter", 303)
    return PlainTextResponse("this page is for researchers: ask for an invitation as one", 403)


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more and len(body) <= LARGEST:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _sealed(send: Send, sealing: dict[str, str]) -> Send:
    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in sealing.items():
                headers[name] = value
        await send(message)

    return sealed
