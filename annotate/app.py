"""The labelling page: FastAPI for who is working, Gradio for the page, a gate before both.

    store = Store()
    serve(store, store.open_round("mine", items), "My round", port=7860)

The page is one `gr.HTML` component (page/stage.html, .css, scripts) with the server functions of `Calls`.
"""

import json
import os
import socket
from collections.abc import Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from annotate.calls import FUNCTIONS, Calls
from annotate.entry import add_entry
from annotate.form import Form
from annotate.gate import CALL, UNREACHABLE, Gate
from annotate.records import DataError
from annotate.researcher import add_researcher
from annotate.store import Store

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # no call home
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",  # else a summary of all past events after every event
    "HF_HUB_OFFLINE": "1",
}
SCRIPTS = ("stage.js", "form.js", "reading.js", "outbox.js", "keys.js")
"""One after the other they are one function, of which Gradio runs the body."""


def serve(
    store: Store,
    round_id: int,
    title: str,
    name: str | None = None,
    port: int = 7860,
    url: str | None = None,
    guidelines: str | None = None,
    form: Form | None = None,
) -> None:
    """Serve the page on 127.0.0.1 until interrupted. `name`: who works, else the browser is asked.

    `url`: where a proxy makes the page reachable to others, who then enter by invitation only.
    `guidelines`: Markdown to read before work, else those of the form in page/. `form`: what to ask,
    else which of two replies is better.
    Raises DataError when the port is taken. Port 0 takes a free one.
    """
    import uvicorn

    # The protocol is named since asyncio sends without delay (40 ms an answer) only where it is.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()  # whoever follows the printed address now is served as soon as all is loaded
        except OSError as error:
            raise DataError(f"port {port}: {error.strerror}; choose another with --port") from None
        app = application(store, round_id, title, name, url, guidelines, form)
        here = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        label = f"{url}/, sent on to {here}" if url else here
        print(f"Label at {label}  (Ctrl-C ends; every label is kept)", flush=True)
        print(f"See how it goes at {url or here.rstrip('/')}/round", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # seconds: longer than most pairs are read
        )
        uvicorn.Server(config).run(sockets=[listener])


def application(
    store: Store,
    round_id: int,
    title: str,
    name: str | None = None,
    url: str | None = None,
    guidelines: str | None = None,
    form: Form | None = None,
) -> Gate:
    """The ASGI application of one round; arguments as of `serve`."""
    if name is not None:
        store.annotator(name)  # refuses a bad name now rather than in the browser
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(DataError, lambda *_: PlainTextResponse(UNREACHABLE, 503))
    add_entry(app, store, name, url)
    add_researcher(app, store, round_id, title)
    form = form or Form()
    text = page_file(f"guidelines-{form.kind}.md") if guidelines is None else guidelines
    calls = Calls(store, round_id, title, text, form)
    _answer_calls(app, calls)
    component = _mount_page(app, title)
    return Gate(app, store, component, set(FUNCTIONS), url)


def _mount_page(app: FastAPI, title: str) -> int:
    """Mount the Gradio page at /label and return the id of its one component."""
    os.environ.update(QUIET)  # before the import
    import gradio as gr

    with gr.Blocks(title=f"prefloop: {title}", analytics_enabled=False) as blocks:
        stage = gr.HTML(
            html_template=page_file("stage.html"),
            css_template=page_file("stage.css"),
            js_on_load="\n".join(map(page_file, SCRIPTS)),
            server_functions=[_named(name) for name in FUNCTIONS],
            apply_default_css=False,
        )
    gr.mount_gradio_app(
        app,
        blocks,
        "/label",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size="1kb",
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
    )
    return int(stage._id)


def _named(name: str) -> Callable[[], None]:
    """What Gradio has the page call by this name, and `_answer_calls` answers."""

    def function() -> None: ...

    function.__name__ = name
    return function


def _answer_calls(app: FastAPI, calls: Calls) -> None:
    """Answer the page's server functions here, before Gradio sees the call, which the gate has looked at.

    Gradio would go by way of two more threads, its sessions and a look at the signature, at every step.
    """

    async def answer(request: Request) -> Response:
        call = request.scope["call"]
        method = getattr(calls, call["fn_name"])
        found = await run_in_threadpool(method, call["data"], request.scope["annotator"])
        return Response(json.dumps(found), media_type="application/json")

    for path in (CALL, CALL + "/"):
        app.add_route(path, answer, methods=["POST"])


def page_file(name: str) -> str:
    return (files("annotate") / "page" / name).read_text(encoding="utf-8")
