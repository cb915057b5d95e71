"""Who is working: a name on one's own machine, an invitation everywhere else; then a session cookie.

An invitation is a link that ends in #secret. Browsers keep what follows the # to themselves, so the secret
stands in no log of a server or proxy on its way; the page of the entry posts it. The database holds its hash.
"""

import time
from collections import deque
from collections.abc import Callable
from html import escape
from importlib.resources import files
from string import Template
from urllib.parse import urlsplit

from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from annotate.gate import HOSTS, cookie_name
from annotate.records import DataError, Role
from annotate.store import Store

YEAR = 365 * 24 * 3600
ASK_NAME = {
    "title": "Who is working?",
    "text": "Your labels are stored under this name. Use the same next time; it need not be your real one.",
    "label": "Name",
    "field": "name",
    "limit": "60",
}
ASK_INVITATION = {
    "title": "You need an invitation",
    "text": "Open the link you were given, or paste it here. It works on every device, as often as you like.",
    "label": "Invitation",
    "field": "invitation",
    "limit": "300",
}


class Throttle:
    """Counts wrong guesses of all callers together, since behind a proxy they have one address."""

    def __init__(self, limit: int = 20, seconds: float = 60.0):
        self.limit, self.seconds = limit, seconds
        self._wrong: deque[float] = deque(maxlen=limit)

    def wrong(self) -> None:
        self._wrong.append(time.monotonic())

    def closed(self) -> bool:
        """Whether `limit` guesses went wrong within the last `seconds`: nothing is tried then."""
        return len(self._wrong) == self.limit and time.monotonic() - self._wrong[0] < self.seconds


def public_url(text: str) -> str:
    """The address under which annotators reach the page, checked: https, or http on this machine."""
    parts = urlsplit(text)
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in HOSTS)
    if (
        not safe
        or not parts.hostname
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
        or "@" in text
    ):
        raise DataError(
            f"{text}: write https://name[:port], the address of a proxy that sends to this machine"
        )
    return f"{parts.scheme}://{parts.netloc.lower()}"


def invitation(store: Store, name: str, url: str, role: Role = "annotator") -> str:
    """A new link for this annotator. The link given before, and every session begun with it, end."""
    return f"{url}/enter#{store.invite(name, role)}"


def add_entry(app: FastAPI, store: Store, default: str | None, url: str | None) -> None:
    """Routes of the entry. `default` works without being asked; with a `url`, only invitations let in."""
    throttle = Throttle()
    begin = _beginner(store, secure=(url or "").startswith("https:"))

    @app.get("/")
    def root(request: Request) -> Response:
        who = request.scope["annotator"]
        if default is not None and (who is None or who[1] != default):
            return begin(store.annotator(default))
        return RedirectResponse("/enter" if who is None else "/label/", 303)

    @app.get("/enter")
    def ask() -> Response:
        return _page(url)

    @app.post("/enter")
    def enter(name: str = Form(""), invitation: str = Form("")) -> Response:
        try:
            if invitation or url is not None:
                return begin(_invited(store, throttle, invitation))
            return begin(store.annotator(name.strip()))
        except DataError as error:
            return _page(url, str(error), 429 if throttle.closed() else 422)

    @app.get("/whoami")
    def whoami(request: Request) -> Response:
        who = request.scope["annotator"]
        return JSONResponse({"name": who and who[1]}, 401 if who is None else 200)

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)


def _invited(store: Store, throttle: Throttle, invitation: str) -> int:
    if throttle.closed():
        raise DataError("too many wrong invitations; try again in a minute")
    found = store.invited(invitation.strip().rpartition("#")[2])
    if found is None:
        throttle.wrong()
        raise DataError("this invitation is not, or no longer, good: ask for a new link")
    return found


def _beginner(store: Store, secure: bool) -> Callable[[int], Response]:
    def begin(annotator: int) -> Response:
        secret = store.start_session(annotator)
        who = store.session(secret)
        response = RedirectResponse("/round" if who and who.role == "researcher" else "/label/", 303)
        response.set_cookie(
            cookie_name(store), secret, max_age=YEAR, httponly=True, samesite="strict", secure=secure
        )
        return response

    return begin


def _page(url: str | None, error: str = "", status: int = 200) -> Response:
    page = Template((files("annotate") / "page" / "enter.html").read_text(encoding="utf-8"))
    asked = ASK_NAME if url is None else ASK_INVITATION
    return HTMLResponse(page.substitute(asked, error=escape(error)), status)
