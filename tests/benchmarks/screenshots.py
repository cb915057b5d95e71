"""Pictures of every page of the labelling tool, to be looked at: results/annotate/*.png.

python -m tests.benchmarks.screenshots
"""

import io
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser

from annotate.queue import Shown
from annotate.records import Item, Message, draw, prompt_id
from annotate.rules import Check, Rules
from stages import yamlfile
from tests.crowd import judge
from tests.desk import Desk, Served, chromium

FOLDER = Path("results/annotate")
ASKED = (
    "Hello, my order 4711 has not come yet. It was promised for Tuesday. What can I do?",
    "I am sorry to hear that. Which address did you give?",
    "The one of my office, Hafenstraße 12. Can you send it again?",
)
REPLIES = (
    "I looked it up: the parcel was handed to the **carrier on Monday** and is late.\n\n"
    "1. Wait until Thursday evening.\n2. If it is not there by then, write to us; you get another."
    "\n\nYou can follow it under `orders/4711`.",
    "I looked it up: the parcel was handed to the **carrier on Friday** and is lost.\n\n"
    "1. Do nothing.\n2. If it is there by then, write to us; we send it again at your cost.",
)


def items(count: int = 12) -> list[Item]:
    found = []
    for number in range(count):
        roles = ("user", "assistant", "user")
        prompt = [Message(role=role, content=text) for role, text in zip(roles, ASKED, strict=True)]
        prompt[0] = Message(role="user", content=ASKED[0].replace("4711", str(4711 + number)))
        texts = [reply.replace("4711", str(4711 + number)) for reply in REPLIES]
        row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
        found.append(Item(**row, completions=texts))
    return found


def small(png: bytes, name: str) -> None:
    """In 32 colours, which is what the page has."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(32, dither=Image.Dither.NONE)
    image.save(FOLDER / f"{name}.png", optimize=True)


def visit(browser: Browser, served: Served, name: str, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)

    def keep(page: str) -> None:
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"{page}-{name}")

    entry = context.new_page()
    entry.goto(served.home)
    small(entry.screenshot(), f"entry-{name}")
    desk = Desk(context, served, f"viewer {name}")
    keep("pair")
    desk.press("x")
    keep("differences")
    desk.press("m")
    desk.page.wait_for_selector(".replies .rich")
    keep("markdown")
    desk.press("m")
    for key, page in (("?", "help"), ("g", "guidelines"), ("s", "skip")):
        desk.press(key)
        keep(page)
        desk.page.keyboard.press("Escape")
    for key in "215620":
        desk.press(key)
    desk.press("u")
    keep("revise")
    desk.press("Enter")
    for _ in range(6):
        desk.press("4")
    desk.sent()
    desk.page.wait_for_selector('.stage[data-state="empty"]')
    keep("done")
    context.close()


def forms(browser: Browser, folder: Path) -> None:
    """A ranking of four, and a pair of which more is asked."""
    four = [
        item.model_copy(update={"completions": [*item.completions, item.completions[0][:99], ASKED[1]]})
        for item in items()
    ]
    for name, tasks, keys in (("ranking", four, "31"), ("helpful-honest-harmless", items(), "2")):
        (folder / name).mkdir()
        served = Served(folder / name, tasks, form=yamlfile.read(Path(f"configs/forms/{name}.yaml")))
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        desk = Desk(context, served, "viewer")
        for key in keys:
            desk.press(key)
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"form-{name}")
        desk.press("n")
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"form-{name}-note")
        context.close()
        served.kill()


def verdict(name: str, shown: Shown) -> dict[str, Any]:
    """Of one of the crowd: most see the same, one does not read, one would rather not."""
    dice = draw(name, shown.task)
    seen = (1 if "Monday" in shown.completions[0] else -1) * (1 + int(dice * 3))
    if name == "quick fox":
        return {"preference": 1 + int(dice * 3), "client_ms": 500 + int(dice * 2500)}
    if dice > 0.95 or (name == "maja" and dice > 0.7):
        reason = ["I cannot tell which carrier is meant.", "Both say the same.", ""][int(dice * 100) % 3]
        return {"preference": None, "reason": reason or None, "client_ms": 9000}
    wrong = draw(name, shown.task, "wrong") > 0.92
    preference = 0 if dice < 0.12 else -seen if wrong else seen
    return {"preference": preference, "client_ms": 5000 + int(dice * 20_000)}


def research(browser: Browser, folder: Path) -> None:
    """What a researcher sees of a round that eight people have worked on since the morning."""
    folder.mkdir()
    tasks = items(120)
    for n in range(0, len(tasks), 2):  # neither place is always the better one
        tasks[n] = tasks[n].model_copy(update={"completions": tasks[n].completions[::-1]})
    known = [
        Check(prompt=it.prompt, completions=it.completions, better=0 if "Monday" in it.completions[0] else 1)
        for it in items(128)[120:]
    ]
    served = Served(folder, tasks, overlap=3, extras={"checks": known, "rules": Rules(repeats=0.1)})
    people = ["ann", "bob", "fern", "maja", "noor", "otter 7", "quick fox", "zoë"]
    start = time.time() - 5.2 * 3600
    for minute in range(5, 310, 5):
        for name in people:
            lunch = 150 < minute < 190
            if not lunch and draw("works", name, minute) < 0.66:
                judge(served.store, served.round, name, start + 60 * minute, partial(verdict, name))
    [fox] = [i for i, name in [(served.store.annotator(n), n) for n in people] if name == "quick fox"]
    for name, width, scheme in (("light", 1200, "light"), ("dark", 1200, "dark"), ("phone", 390, "light")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        for path, kept in (
            ("/round", "round"),
            (f"/round/annotator/{fox}", "annotator"),
            ("/round/disagreements", "disagreements"),
        ):
            page.goto(served.home + path)
            whole = kept == "round"
            page.set_viewport_size({"width": width, "height": 800 if whole else 1400})
            small(page.screenshot(full_page=whole), f"{kept}-{name}")
        context.close()
    served.kill()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        served = Served(Path(folder), items())
        visit(browser, served, "light", 1200, 800, "light")
        visit(browser, served, "dark", 1200, 800, "dark")
        visit(browser, served, "phone", 390, 780, "light")
        served.kill()
        forms(browser, Path(folder))
        research(browser, Path(folder) / "research")


if __name__ == "__main__":
    main()
