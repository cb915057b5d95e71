"""The labelling page: FastAPI for who is working, Gradio for the page, a gate before both.

    store = Store()
    serve(store, store.open_round("mine", items), "My round", port=7860)

The page is one `gr.HTML` component (page/stage.html, .css, .js) with two server functions. Both
take the annotator from the gate; step checks every label and answers after COMMIT. No answer names a model.
"""

import os
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from annotate.entry import add_entry
from annotate.gate import Gate
from annotate.queue import Label, Shown
from annotate.records import DataError
from annotate.store import Store

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # no call home
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",  # else a summary of all past events after every event
    "HF_HUB_OFFLINE": "1",
}


class Step(BaseModel):
    """What the page sends: finished labels, how many open tasks it wants to hold, whether to count."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    labels: list[Label] = Field(max_length=50)
    want: int = Field(ge=0, le=10)
    count: bool = False


def serve(
    store: Store,
    round_id: int,
    title: str,
    name: str | None = None,
    port: int = 7860,
    url: str | None = None,
) -> None:
    """Serve the page on 127.0.0.1 until interrupted. `name`: who works, else the browser is asked.

    `url`: where a proxy makes the page reachable to others, who then enter by invitation only.
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
        app = application(store, round_id, title, name, url)
        here = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        label = f"{url}/, sent on to {here}" if url else here
        print(f"Label at {label}  (Ctrl-C ends; every label is kept)", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False)
        uvicorn.Server(config).run(sockets=[listener])


def application(
    store: Store, round_id: int, title: str, name: str | None = None, url: str | None = None
) -> Gate:
    """The ASGI application of one round."""
    if name is not None:
        store.annotator(name)  # refuses a bad name now rather than in the browser
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_entry(app, store, name, url)
    component = _mount_page(app, store, round_id, title)
    return Gate(app, store, component, {"hello", "step"}, url)


def _mount_page(app: FastAPI, store: Store, round_id: int, title: str) -> int:
    """Mount the Gradio page at /label and return the id of its one component."""
    os.environ.update(QUIET)  # before the import
    import gradio as gr

    hello, step = _server_functions(store, round_id, title, gr.Request)
    with gr.Blocks(title=f"prefloop: {title}", analytics_enabled=False) as blocks:
        stage = gr.HTML(
            html_template=_page_file("stage.html"),
            css_template=_page_file("stage.css"),
            js_on_load=_page_file("stage.js"),
            server_functions=[hello, step],
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


def _server_functions(
    store: Store, round_id: int, title: str, request_type: type[Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The page's two calls. Gradio recognises the request argument by its annotation."""

    def hello(_: object, request: Any) -> dict[str, Any]:
        annotator, name = request.scope["annotator"]
        past = store.history(round_id, annotator)
        return {
            "ok": True,
            "database": store.id[:8],
            "round": round_id,
            "annotator": annotator,
            "name": name,
            "title": title,
            "progress": _progress(store, round_id, annotator),
            "history": [{**_task(shown), "preference": preference} for shown, preference in past],
        }

    def step(argument: object, request: Any) -> dict[str, Any]:
        annotator, _ = request.scope["annotator"]
        try:
            asked = Step.model_validate(argument)
            statuses, shown = store.step(round_id, annotator, asked.labels, asked.want)
        except ValidationError as error:
            first = error.errors()[0]
            return {"error": f"not saved: {'.'.join(map(str, first['loc']))}: {first['msg']}"}
        except DataError as error:
            return {"error": f"not saved: {error}"}
        answer = {"ok": True, "statuses": statuses, "tasks": [_task(task) for task in shown]}
        if asked.count:
            answer["progress"] = _progress(store, round_id, annotator)
        return answer

    for function in (hello, step):
        function.__annotations__["request"] = request_type
    return hello, step


def _task(shown: Shown) -> dict[str, Any]:
    return {"key": shown.key, "messages": shown.messages, "completions": shown.completions}


def _progress(store: Store, round_id: int, annotator: int) -> dict[str, int]:
    mine = store.progress(round_id, annotator)
    return {"asked": mine.asked, "done": mine.done}


def _page_file(name: str) -> str:
    return (files("annotate") / "page" / name).read_text(encoding="utf-8")
